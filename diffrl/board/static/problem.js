// Problems, and how the completions of one of them changed over the training.

import { h, labelled, link, number, pager, percent, replace, select } from "./dom.js";
import { lineChart } from "./charts.js";
import { rewardBar, rolloutLink, verdict } from "./table.js";

const SORTS = [["count", "rollouts"], ["reward", "mean reward"], ["solved", "solved"], ["problem", "name"]];

export function problems(root, board) {
  const params = board.params();
  const form = h("form", { class: "filters" },
    labelled("Problem", h("input", { name: "problem", type: "search", value: params.problem ?? "", placeholder: "part of its name  /" })),
    labelled("Sort by", select("sort", params.sort ?? "count", SORTS)),
    labelled("Order", select("dir", params.dir ?? "desc", [["desc", "falling"], ["asc", "rising"]])));
  const body = h("div", {});
  root.append(h("h1", {}, "Problems"), form, body);
  let wait = null;
  form.addEventListener("input", () => {
    clearTimeout(wait);
    wait = setTimeout(() => board.go("problems", { ...board.params(), ...Object.fromEntries(new FormData(form)), page: "" }, true), 200);
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  return {
    async update(given, fresh) {
      const answer = await board.get("problems", given);
      if (!fresh()) return;
      replace(body, answer.total ? h("table", { class: "problems" },
        h("thead", {}, h("tr", {}, ["Problem", "Rollouts", "Mean reward", "All tests passed"].map((text) => h("th", { scope: "col" }, text)))),
        h("tbody", {}, answer.rows.map((row) => h("tr", {},
          h("td", {}, h("a", { href: link("problem", { run: given.run, id: row.problem }) }, row.problem)),
          h("td", {}, number(row.count)), h("td", {}, rewardBar(row.reward)), h("td", {}, percent(row.solved))))))
        : h("p", { class: "empty" }, "No problem passes this filter."),
      answer.total ? pager("problems", given, answer.page, answer.num_pages, answer.total, "problems") : null);
    },
  };
}

export function problem(root, board) {
  let shown = "";
  return {
    async update(params, fresh) {
      const answer = await board.get("problem", { run: params.run, id: params.id });
      if (!fresh()) return;
      const mark = JSON.stringify(answer);
      if (mark === shown) return;
      shown = mark;
      const groups = new Map();
      for (const row of answer.rows) groups.set(row.step, [...(groups.get(row.step) ?? []), row]);
      const cut = answer.total > answer.rows.length ? ` The newest ${number(answer.rows.length)} of ${number(answer.total)} completions are shown.` : "";
      replace(root, h("h1", {}, answer.problem), h("p", { class: "lead" }, `Sampled at ${number(answer.curve.x.length)} steps.${cut}`),
        h("div", { class: "split even" }, h("section", { class: "card" }, h("h2", {}, "Prompt"), h("pre", { tabIndex: 0 }, answer.prompt ?? "not recorded")),
          lineChart("mean reward of its completions", [{ name: "reward", ...answer.curve }])),
        [...groups].map(([step, rows]) => h("section", {}, h("h2", {}, `Step ${number(step)}`),
          h("div", { class: "siblings" }, rows.map((row) => h("article", { class: "card sibling" },
            h("h3", {}, h("a", { href: rolloutLink(row, params) }, `sample ${row.sample}`), verdict(row.verdict)),
            h("p", { class: "advantage" }, `reward ${number(row.reward)}`),
            h("pre", { tabIndex: 0, "aria-label": `completion of sample ${row.sample} at step ${step}` }, row.completion ?? "not recorded")))))));
    },
  };
}
