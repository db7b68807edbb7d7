// Elements made from data. Whatever a model wrote becomes a text node, never markup.

const PROPERTIES = new Set(["value", "checked", "disabled", "hidden", "open", "selected", "tabIndex"]);
const SVG = "http://www.w3.org/2000/svg";
// control characters, bidirectional overrides, zero-width and line separators: what could hide or reorder text
const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\uffff]/g;

export function visible(text) {
  return String(text).replace(UNSEEN, (sign) => {
    const code = sign.charCodeAt(0);
    if (code < 0x20) return String.fromCharCode(0x2400 + code);
    if (code === 0x7f) return "\u2421";
    return code === 0xfffd ? sign : `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
  });
}

function fill(element, properties, children) {
  for (const [name, value] of Object.entries(properties ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (PROPERTIES.has(name)) element[name] = value;
    else element.setAttribute(name, value === true ? "" : visible(value));
  }
  add(element, children);
  return element;
}

export function add(element, children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : document.createTextNode(visible(child)));
  }
}

export function h(tag, properties, ...children) {
  return fill(document.createElement(tag), properties, children);
}

export function svg(tag, properties, ...children) {
  return fill(document.createElementNS(SVG, tag), properties, children);
}

export function replace(element, ...children) {
  element.replaceChildren();
  add(element, children);
}

export function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  return size !== 0 && (size < 0.001 || size >= 1e6) ? value.toExponential(2) : String(+value.toFixed(size < 0.1 ? digits + 2 : digits));
}

export function signed(value) {
  return value === null || value === undefined ? "–" : `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(2)}`;
}

export function percent(value) {
  return value === null || value === undefined ? "–" : `${(100 * value).toFixed(1)}%`;
}

// A place within the board: link("rollouts", {verdict: "failed"}) is "#/rollouts?verdict=failed".
export function link(view, params = {}) {
  const kept = Object.entries(params).filter(([, value]) => value !== "" && value !== null && value !== undefined);
  const query = new URLSearchParams(kept).toString();
  return `#/${view}${query ? `?${query}` : ""}`;
}

export function labelled(text, control) {
  return h("label", {}, h("span", {}, text), control);
}

export function select(name, value, options) {
  return h("select", { name }, options.map(([key, text]) => h("option", { value: key, selected: key === (value ?? "") }, text)));
}

export const OFF = { class: "off", role: "link", "aria-disabled": "true" }; // a link that leads nowhere now

export function pager(view, params, page, pages, total, what) {
  const to = (n, text) => n >= 1 && n <= pages
    ? h("a", { href: link(view, { ...params, page: n === 1 ? "" : n }), rel: n < page ? "prev" : "next" }, text)
    : h("span", OFF, text);
  return h("nav", { class: "pager", "aria-label": "Pages" }, to(page - 1, "← back"),
    h("span", {}, `page ${number(page)} of ${number(pages)} · ${number(total)} ${what}`), to(page + 1, "on →"));
}
