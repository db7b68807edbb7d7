// Curves as SVG, maps as canvas. A chart says in words what it shows, for those who do not see it.

import { h, number, svg } from "./dom.js";
import { viridis } from "./colors.js";

const COMPACT = new Intl.NumberFormat("en", { notation: "compact" });
const W = 380, H = 190, LEFT = 46, RIGHT = 10, TOP = 10, BOTTOM = 24;

function ticks(low, high, count) {
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find((m) => m * power >= raw) * power;
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step / 1e6; value += step) found.push(+value.toPrecision(12));
  return found;
}

function extent(values, pad) {
  let low = Infinity, high = -Infinity;
  for (const value of values) if (value !== null) { low = Math.min(low, value); high = Math.max(high, value); }
  if (low > high) return [0, 1];
  if (low === high) return [low - (Math.abs(low) * 0.1 || 0.5), high + (Math.abs(high) * 0.1 || 0.5)];
  return [low - (high - low) * pad, high + (high - low) * pad];
}

// series: [{name, x: [...], y: [... or null]}], drawn in the colours of runs (or of --curve-N)
export function lineChart(title, series, tools) {
  const kept = series.filter((one) => one.x.length);
  const [x0, x1] = extent(kept.flatMap((one) => one.x), 0);
  const [y0, y1] = extent(kept.flatMap((one) => one.y), 0.06);
  const px = (x) => LEFT + (W - LEFT - RIGHT) * (x - x0) / (x1 - x0);
  const py = (y) => H - BOTTOM - (H - TOP - BOTTOM) * (y - y0) / (y1 - y0);
  const words = kept.map((one) => `${one.name}: ${number(short(one.y[0]))} to ${number(short(one.y.at(-1)))}`).join("; ") || "nothing yet";
  const picture = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${title}; ${words}`, class: "chart" });
  for (const y of ticks(y0, y1, 5)) {
    picture.append(svg("line", { class: "grid", x1: LEFT, x2: W - RIGHT, y1: py(y), y2: py(y) }),
      svg("text", { class: "tick", x: LEFT - 6, y: py(y) + 3.5, "text-anchor": "end" }, Math.abs(y) >= 1e4 ? COMPACT.format(y) : String(y)));
  }
  for (const x of ticks(x0, x1, 5)) {
    if (Number.isInteger(x)) picture.append(svg("text", { class: "tick", x: px(x), y: H - 7, "text-anchor": "middle" }, number(x)));
  }
  series.forEach((one, index) => {
    let path = "", pen = false;
    one.x.forEach((x, n) => {
      if (one.y[n] === null) { pen = false; return; }
      path += `${pen ? "L" : "M"}${px(x).toFixed(1)} ${py(one.y[n]).toFixed(1)}`;
      pen = true;
    });
    picture.append(svg("path", { class: `curve curve-${index}`, d: path }));
    if (one.x.length < 50) {
      one.x.forEach((x, n) => one.y[n] !== null && picture.append(
        svg("circle", { class: `dot curve-${index}`, cx: px(x), cy: py(one.y[n]), r: one.x.length === 1 ? 3.5 : 1.8 })));
    }
  });
  const cursor = svg("line", { class: "cursor", y1: TOP, y2: H - BOTTOM, x1: -9, x2: -9 });
  picture.append(cursor);
  const readout = h("p", { class: "readout" }, last(series));
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const x = x0 + ((event.clientX - box.left) / box.width * W - LEFT) / (W - LEFT - RIGHT) * (x1 - x0);
    const at = nearest(kept, x);
    if (at === null) return;
    cursor.setAttribute("x1", px(at));
    cursor.setAttribute("x2", px(at));
    readout.textContent = `step ${number(at)}: ${said(series, (one) => one.y[one.x.indexOf(at)])}`;
  });
  picture.addEventListener("pointerleave", () => {
    cursor.setAttribute("x1", -9);
    cursor.setAttribute("x2", -9);
    readout.textContent = last(series);
  });
  return h("figure", { class: "card" }, h("figcaption", {}, h("span", {}, title), tools ?? null), picture, readout);
}

const short = (value) => (value === undefined || value === null ? null : +value.toPrecision(4));

function said(series, value) {
  return series.map((one) => (series.length > 1 ? `${one.name} ` : "") + number(short(value(one)))).join(" · ");
}

function last(series) {
  const step = Math.max(...series.map((one) => one.x.at(-1) ?? -1));
  return step < 0 ? "nothing yet" : `step ${number(step)}: ${said(series, (one) => one.y.at(-1))}`;
}

function nearest(series, x) {
  let best = null;
  for (const one of series) for (const at of one.x) if (best === null || Math.abs(at - x) < Math.abs(best - x)) best = at;
  return best;
}

// columns: one per training step, each with a value in [0, 1] or null per bin
export function heatmap(title, words, steps, columns, bins) {
  const canvas = h("canvas", { width: Math.max(1, steps.length), height: bins, class: "map", role: "img", "aria-label": `${title}. ${words}` });
  const context = canvas.getContext("2d");
  columns.forEach((column, x) => column.forEach((value, bin) => {
    if (value === null) return;
    context.fillStyle = `rgb(${viridis(value).join(",")})`;
    context.fillRect(x, bin, 1, 1);
  }));
  const readout = h("p", { class: "readout" }, "point at the map to read it");
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const x = Math.min(steps.length - 1, Math.floor((event.clientX - box.left) / box.width * steps.length));
    const bin = Math.min(bins - 1, Math.floor((event.clientY - box.top) / box.height * bins));
    const value = columns[x]?.[bin] ?? null;
    readout.textContent = `training step ${number(steps[x])}, ${Math.round(100 * bin / bins)}–${Math.round(100 * (bin + 1) / bins)}% ` +
      `of the completion: revealed after ${value === null ? "–" : Math.round(100 * value)}% of the denoising`;
  });
  return h("figure", { class: "card" }, h("figcaption", {}, title), h("div", { class: "map-box" },
    h("div", { class: "map-y", "aria-hidden": "true" }, h("span", {}, "start"), h("span", {}, "of the completion"), h("span", {}, "end")), canvas),
  h("div", { class: "map-x" }, h("span", {}, `step ${number(steps[0] ?? null)}`), scale("revealed first", "last"),
    h("span", {}, `step ${number(steps.at(-1) ?? null)}`)), readout);
}

export function scale(from, to) {
  return h("span", { class: "scale" }, from, h("i", { "aria-hidden": "true" }), to);
}
