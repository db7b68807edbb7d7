// Tables of rollouts: filters and order are the address, so that every table is a link.

import { h, labelled, link, number, pager, replace, select, signed } from "./dom.js";

const COLUMNS = [["step", "Step"], ["problem", "Problem"], ["reward", "Reward"], ["advantage", "Advantage"], ["verdict", "Verdict"],
  ["staleness", "Staleness"], ["trust", "Trust"], ["length", "Tokens"], ["flags", "Suspicion"]];
const RANGES = [["step", "Step"], ["reward", "Reward"], ["staleness", "Staleness"], ["length", "Tokens"]];
const SIGNS = { "passed": "✓", "some passed": "◐", "failed": "✗", "error": "!", "timeout": "◷", "out_of_memory": "▤", "killed": "†",
  "not_run": "–", "not judged": "?", "unknown": "?" };

export function verdict(name) {
  const kind = name === "passed" ? "good" : name === "some passed" ? "half" : name === "not judged" || name === "unknown" ? "none" : "bad";
  return h("span", { class: `verdict ${kind}` }, h("i", { "aria-hidden": "true" }, SIGNS[name] ?? "?"), name.replaceAll("_", " "));
}

export function rewardBar(reward, most = 2.5) {
  const bar = h("span", { class: "bar-box", "aria-hidden": "true" }, h("i", {}));
  bar.firstChild.style.width = `${Math.max(0, Math.min(1, (reward ?? 0) / most)) * 100}%`;
  return h("span", { class: "reward" }, h("b", {}, number(reward)), bar);
}

export function flags(names, heuristics) {
  return names.map((name) => h("span", { class: "flag", title: heuristics.find((one) => one.name === name)?.words }, name.replaceAll("_", " ")));
}

export function rolloutLink(row, params = {}) {
  const [step, ordinal, sample] = row.key.split("/");
  return link("rollout", { run: params.run, step, ordinal, sample });
}

function cells(row, params, heuristics) {
  return {
    step: number(row.step),
    problem: h("a", { href: rolloutLink(row, params) }, row.problem, h("small", {}, ` · sample ${number(row.sample)}`)),
    reward: rewardBar(row.reward),
    advantage: signed(row.advantage),
    verdict: verdict(row.verdict),
    staleness: number(row.staleness),
    trust: h("span", { class: row.trust === "low" ? "flag" : "" }, row.trust),
    length: number(row.length),
    flags: row.flags.length ? flags(row.flags, heuristics) : "",
  };
}

function filters(view, board, params, fixed) {
  const { verdicts, heuristics } = board.state();
  const any = (text) => ["", text];
  const form = h("form", { class: "filters" },
    labelled("Problem", h("input", { name: "problem", type: "search", value: params.problem ?? "", placeholder: "part of its name  /" })),
    labelled("Verdict", select("verdict", params.verdict, [any("any"), ...verdicts.map((name) => [name, name.replaceAll("_", " ")])])),
    labelled("Trust", select("trust", params.trust, [any("any"), ["low", "low"], ["high", "high"]])),
    labelled("Suspicion", select("flag", params.flag ?? fixed.flag, [...(fixed.flag ? [] : [any("whatever")]), ["any", "anything"],
      ...heuristics.map((one) => [one.name, one.title.toLowerCase()])])),
    RANGES.map(([name, text]) => h("fieldset", {}, h("legend", {}, text), ["min", "max"].map((end) => h("input", {
      name: `${name}_${end}`, type: "number", step: "any", inputmode: "decimal", value: params[`${name}_${end}`] ?? "", placeholder: end,
      "aria-label": `${text}, ${end === "min" ? "at least" : "at most"}` })))),
    h("label", { class: "only-phone" }, h("span", {}, "Sort by"), select("order", `${params.sort ?? "step"} ${params.dir ?? "desc"}`,
      COLUMNS.flatMap(([name, text]) => [[`${name} desc`, `${text} ↓`], [`${name} asc`, `${text} ↑`]]))),
    h("button", { type: "button", class: "quiet", onclick: () => board.go(view, { run: board.params().run }) }, "Clear"));
  let wait = null;
  const apply = () => {
    const given = Object.fromEntries(new FormData(form));
    const [sort, dir] = given.order.split(" ");
    delete given.order;
    const order = sort === "step" && dir === "desc" ? { sort: "", dir: "" } : { sort, dir };
    board.go(view, { ...board.params(), ...given, ...order, page: "" }, true);
  };
  form.addEventListener("input", () => { clearTimeout(wait); wait = setTimeout(apply, 250); });
  form.addEventListener("submit", (event) => { event.preventDefault(); clearTimeout(wait); apply(); });
  return form;
}

// The form shows what the address says, without touching the field that is being typed in.
function follow(form, params, fixed) {
  for (const control of form.elements) {
    if (!control.name || control === document.activeElement) continue;
    control.value = control.name === "order" ? `${params.sort ?? "step"} ${params.dir ?? "desc"}` : params[control.name] ?? fixed[control.name] ?? "";
  }
}

function tableOf(view, fixed, above) {
  return (root, board) => {
    const form = filters(view, board, board.params(), fixed);
    const body = h("div", { class: "table-box" });
    const head = above(root, board);
    root.append(h("details", { class: "filter-box", open: matchMedia("(min-width: 700px)").matches }, h("summary", {}, "Filters"), form), body);
    let chosen = 0, begun = false, pages = [1, 1];
    const links = () => [...body.querySelectorAll("tbody a")];
    const choose = (n) => {
      const rows = links();
      chosen = Math.min(rows.length - 1, Math.max(0, n));
      rows.forEach((row, n) => row.closest("tr").toggleAttribute("data-chosen", begun && n === chosen));
      return rows;
    };
    const mark = (move) => {
      const rows = choose(begun ? chosen + move : 0);
      begun = true;
      if (!choose(chosen).length) return;
      rows[chosen].focus({ preventScroll: true });
      rows[chosen].closest("tr").scrollIntoView({ block: "nearest" });
    };
    async function update(params, fresh) {
      const asked = { ...fixed, ...params };
      const answer = await board.get("rollouts", asked);
      if (!fresh()) return;
      const focused = links().indexOf(document.activeElement);
      follow(form, params, fixed);
      head.update?.(params);
      pages = [answer.page, answer.num_pages];
      const { heuristics } = board.state();
      const sort = params.sort ?? "step", dir = params.dir ?? "desc";
      const header = ([name, text]) => {
        const next = name === sort && dir === "desc" ? "asc" : "desc";
        return h("th", { scope: "col", class: `col-${name}`, "aria-sort": name === sort ? (dir === "asc" ? "ascending" : "descending") : null },
          h("a", { href: link(view, { ...params, sort: name, dir: next, page: "" }) }, text, name === sort ? (dir === "asc" ? " ↑" : " ↓") : ""));
      };
      const line = (row) => {
        const shown = cells(row, params, heuristics);
        return h("tr", {}, COLUMNS.map(([name, text]) => h("td", { class: `col-${name}`, "data-label": text }, shown[name])));
      };
      replace(body, answer.total ? [
        h("table", { class: "rollouts" }, h("thead", {}, h("tr", {}, COLUMNS.map(header))), h("tbody", {}, answer.rows.map(line))),
        pager(view, params, answer.page, answer.num_pages, answer.total, "rollouts"),
      ] : h("p", { class: "empty" }, board.state().runs.every((run) => run.rollouts === 0) ? "No rollouts yet: they appear here as steps are written."
        : fixed.flag ? "Nothing suspicious passes these filters." : "No rollout passes these filters."));
      if (focused >= 0) links()[Math.min(focused, links().length - 1)]?.focus({ preventScroll: true });
      choose(chosen);
    }
    return {
      update,
      key(event) {
        const params = board.params(), [page, num] = pages;
        const move = { j: 1, k: -1 }[event.key];
        if (move) { mark(move); return true; }
        const turn = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
        if (turn && page + turn >= 1 && page + turn <= num) { chosen = 0; begun = false; board.go(view, { ...params, page: page + turn }); return true; }
        return false;
      },
    };
  };
}

export const rollouts = tableOf("rollouts", {}, (root) => { root.append(h("h1", {}, "Rollouts")); return {}; });

export const suspicious = tableOf("suspicious", { flag: "any" }, (root, board) => {
  const list = h("dl", { class: "heuristics" });
  root.append(h("h1", {}, "Suspicious rewards"), h("p", { class: "lead" },
    "Rollouts that some test paid and that one of these heuristics points at. They are rules over text: an honest program may be listed, and a " +
    "clever cheat may not."), list);
  return {
    async update(params) {
      const { heuristics } = board.state();
      const counts = await Promise.all(heuristics.map((one) => board.get("rollouts", { run: params.run, flag: one.name, size: 1 })));
      replace(list, heuristics.map((one, n) => h("div", {}, h("dt", {}, h("a", { href: link("suspicious", { run: params.run, flag: one.name }) },
        one.title), h("b", {}, number(counts[n].total))), h("dd", {}, one.words))));
    },
  };
});
