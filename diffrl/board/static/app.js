// The frame: which view the address asks for, following the run, the keyboard, light and dark.

import { h, link, number, replace } from "./dom.js";
import { overview } from "./overview.js";
import { rollouts, suspicious } from "./table.js";
import { rollout } from "./rollout.js";
import { problem, problems } from "./problem.js";
import { order } from "./order.js";
import { compare } from "./compare.js";

const VIEWS = { overview, rollouts, rollout, suspicious, problems, problem, order, compare };
const TABS = [["overview", "Overview"], ["rollouts", "Rollouts"], ["suspicious", "Suspicious"], ["problems", "Problems"],
  ["order", "Decoding order"], ["compare", "Compare"]];
const PARENT = { rollout: "rollouts", problem: "problems" };
const POLL_MS = 2000;

const at = (id) => document.getElementById(id);
const main = at("main");
let current = null; // {name, update, key}
let turn = 0; // of showing: an answer that comes late is dropped
let state = null;

function place() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  const params = Object.fromEntries(new URLSearchParams(query));
  return { name: path in VIEWS ? path : "overview", params };
}

async function get(name, query = {}) {
  const kept = Object.entries(query).filter(([, value]) => value !== "" && value !== undefined && value !== null);
  const answer = await fetch(`/api/${name}?${new URLSearchParams(kept)}`, { headers: { Accept: "application/json" } });
  if (answer.status === 401) throw new Error(await answer.text());
  const value = await answer.json();
  if (!answer.ok) throw new Error(value.error ?? `the board answered ${answer.status}`);
  return value;
}

const context = {
  get,
  state: () => state,
  params: () => place().params,
  names: () => state.runs.map((run) => run.name.split("/").slice(-2).join("/")),
  // Another place; replaced: without a step of its own in the browser's history.
  go(view, params, replaced = false) {
    if (replaced) {
      history.replaceState(null, "", link(view, params));
      show();
    } else location.hash = link(view, params);
  },
  // Only the address: what is shown is that already.
  note(view, params) { history.replaceState(null, "", link(view, params)); },
};

async function show() {
  const own = ++turn;
  const { name, params } = place();
  if (!state) return;
  if (current?.name !== name) {
    current?.close?.();
    const root = h("div", { class: `view view-${name}` });
    replace(main, root);
    window.scrollTo(0, 0);
    current = { name, ...VIEWS[name](root, context) };
  }
  frame(name, params);
  try {
    await current.update(params, () => own === turn);
    at("problem-with-view")?.remove();
  } catch (error) {
    if (own !== turn) return;
    at("problem-with-view")?.remove();
    main.prepend(h("p", { class: "error", id: "problem-with-view", role: "alert" }, error.message));
  }
}

function frame(name, params) {
  const run = params.run && state.runs.length > 1 ? { run: params.run } : {};
  const tabs = TABS.filter(([tab]) => tab !== "compare" || state.runs.length > 1);
  replace(at("nav"), tabs.map(([tab, text]) =>
    h("a", { href: link(tab, run), "aria-current": tab === (PARENT[name] ?? name) ? "page" : null }, text)));
  const shown = state.runs[Number(params.run ?? 0)] ?? state.runs[0];
  document.title = `${TABS.find(([tab]) => tab === (PARENT[name] ?? name))[1]} · ${shown.name.split("/").at(-1)} · diffrl board`;
  const which = at("which");
  which.hidden = state.runs.length < 2 || ["compare", "overview", "order"].includes(name);
  replace(which, state.runs.map((one, n) => h("option", { value: String(n), selected: one === shown }, context.names()[n])));
  const reading = shown.read < shown.files ? ` · reading file ${number(shown.read)} of ${number(shown.files)}` : "";
  const looking = shown.unscanned ? ` · texts of ${number(shown.unscanned)} files still to be looked at` : "";
  at("run").textContent = `${state.runs.map((one) => one.name).join("  and  ")} · ${number(shown.rollouts)} rollouts${reading}${looking}`;
  const notes = state.runs.flatMap((one) => one.notes);
  const box = at("notes");
  if (box.dataset.text !== notes.join("\n")) {
    box.dataset.text = notes.join("\n");
    const list = h("ul", {}, notes.map((note) => h("li", {}, note)));
    replace(box, notes.length ? h("details", { class: "notes", open: notes.length < 4 },
      h("summary", {}, notes.length === 1 ? "A note about this run" : `${notes.length} notes about this run`), list) : null);
  }
}

async function poll() {
  try {
    const before = state && state.runs.map((run) => `${run.version}/${run.unscanned === 0}`).join();
    state = await get("state");
    at("lost")?.remove();
    if (before !== state.runs.map((run) => `${run.version}/${run.unscanned === 0}`).join()) await show();
    else frame(place().name, place().params);
  } catch (error) {
    if (!at("lost")) main.prepend(h("p", { class: "error", id: "lost", role: "alert" }));
    at("lost").textContent = error instanceof TypeError ? "The board does not answer: is `diffrl board` still running?" : error.message;
  }
  setTimeout(poll, POLL_MS);
}

function theme(next) {
  if (next) localStorage.setItem("diffrl-theme", next);
  const chosen = localStorage.getItem("diffrl-theme");
  const dark = chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  if (chosen) document.documentElement.dataset.theme = chosen;
  at("theme").textContent = dark ? "Light" : "Dark";
  return dark ? "light" : "dark";
}

function key(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || at("keys").open) return;
  const typing = event.target.closest?.("input:not([type=range]), select, textarea");
  if (typing) {
    if (event.key === "Escape") {
      event.preventDefault(); // a search field would forget what it holds
      typing.blur();
    }
    return;
  }
  if (current?.key?.(event)) return event.preventDefault();
  const pressed = {
    "?": () => at("keys").showModal(),
    "t": () => theme(theme()),
    "/": () => {
      const box = document.querySelector("input[name=problem]");
      if (box) {
        const filters = box.closest("details");
        if (filters) filters.open = true;
        box.select();
        box.focus();
      } else location.hash = link("problems");
    },
  }[event.key];
  const tab = [...at("nav").children][Number(event.key) - 1];
  if (pressed) { event.preventDefault(); pressed(); } else if (tab) location.hash = tab.getAttribute("href");
}

addEventListener("hashchange", show);
addEventListener("keydown", key);
at("theme").addEventListener("click", () => theme(theme()));
at("help").addEventListener("click", () => at("keys").showModal());
at("which").addEventListener("change", (event) => {
  const { name, params } = place();
  const kept = name in PARENT ? {} : params;
  context.go(PARENT[name] ?? name, { ...kept, page: "", run: event.target.value === "0" ? "" : event.target.value });
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => theme());
theme();
poll();
