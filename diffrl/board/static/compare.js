// Two runs: the same problem at the same step, completion by completion. Their curves stand side by side in the overview.

import { h, labelled, link, number, pager, replace, signed } from "./dom.js";
import { lineChart } from "./charts.js";
import { rolloutLink, verdict } from "./table.js";

const CURVES = ["reward/mean", "reward/solved_frac", "loss/kl"];

export function compare(root, board) {
  const curves = h("div", { class: "charts" });
  const body = h("div", {});
  const form = h("form", { class: "filters" }, labelled("Problem", h("input", { name: "problem", type: "search", placeholder: "part of its name  /",
    value: board.params().step === undefined ? board.params().problem ?? "" : "" })));
  const legend = h("p", { class: "legend" });
  root.append(h("h1", {}, "Two runs"), legend, curves, form, body);
  let wait = null;
  form.addEventListener("input", () => {
    clearTimeout(wait);
    wait = setTimeout(() => board.go("compare", { problem: form.elements.problem.value }, true), 200);
  });
  form.addEventListener("submit", (event) => event.preventDefault());

  async function update(params, fresh) {
    const answer = await board.get("metrics", { names: CURVES.join(",") });
    const one = params.step === undefined ? await board.get("pairs", params) : await board.get("pair", params);
    if (!fresh()) return;
    const names = board.names();
    curves.hidden = form.hidden = params.step !== undefined;
    replace(legend, names.map((name, n) => h("span", { class: `key curve-${n}` }, name)), h("a", { href: link("overview") }, "all curves"));
    replace(curves, CURVES.filter((name) => answer.names.includes(name)).map((name) => lineChart(name,
      answer.runs.map((run, n) => ({ name: names[n], ...(run[name] ?? { x: [], y: [] }) })))));
    replace(body, params.step === undefined ? list(one, params, names) : pair(one, names));
  }
  return { update };
}

function list(answer, params, names) {
  if (!answer.total) return h("p", { class: "empty" }, "The runs have no problem and step in common.");
  return [h("h2", {}, "Problems that both sampled at the same step, largest difference first"), h("table", { class: "problems" },
    h("thead", {}, h("tr", {}, ["Step", "Problem", ...names, "Difference"].map((text) => h("th", { scope: "col" }, text)))),
    h("tbody", {}, answer.rows.map((row) => h("tr", {}, h("td", {}, number(row.step)),
      h("td", {}, h("a", { href: link("compare", { problem: row.problem, step: row.step }) }, row.problem)),
      h("td", {}, number(row.first)), h("td", {}, number(row.second)),
      h("td", {}, row.first === null || row.second === null ? "–" : signed(row.second - row.first)))))),
  pager("compare", params, answer.page, answer.num_pages, answer.total, "pairs")];
}

function pair(answer, names) {
  const [first, second] = answer.sides;
  const size = Math.max(first.rows.length, second.rows.length);
  const cell = (row, run) => (row ? h("article", { class: "card sibling" },
    h("h3", {}, h("a", { href: rolloutLink(row, { run: run || "" }) }, `sample ${row.sample}`), verdict(row.verdict)),
    h("p", { class: "advantage" }, `reward ${number(row.reward)} · advantage ${signed(row.advantage)}`),
    h("pre", { tabIndex: 0, "aria-label": `${names[run]}, sample ${row.sample}` }, row.completion ?? "not recorded"))
    : h("p", { class: "empty" }, "no rollout"));
  return [h("div", { class: "row" }, h("h2", {}, `${answer.problem}, step ${number(answer.step)}`), h("a", { class: "button", href: link("compare") }, "all pairs")),
    h("pre", { tabIndex: 0, class: "card" }, first.prompt ?? second.prompt ?? "not recorded"),
    h("div", { class: "pairs" }, names.map((name, n) => h("h3", { class: `key curve-${n}` }, name)),
      Array.from({ length: size }, (_, n) => [cell(first.rows[n], 0), cell(second.rows[n], 1)]))];
}
