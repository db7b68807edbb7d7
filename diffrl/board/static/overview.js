// How the training goes: what there is, and curves of both runs.

import { h, link, number, percent, replace } from "./dom.js";
import { lineChart } from "./charts.js";

const FIRST = ["reward/mean", "reward/solved_frac", "eval/pass@1", "loss/total", "loss/kl", "loss/diffusion", "validation/diffusion",
  "optim/grad_norm", "rollout/length_mean", "rollout/staleness_mean", "sandbox/low_trust_frac", "sandbox/infra_error_frac"];

export function overview(root, board) {
  const cards = h("div", { class: "cards" });
  const charts = h("div", { class: "charts" });
  const picker = h("select", { "aria-label": "Add a curve" });
  const legend = h("p", { class: "legend" });
  root.append(h("h1", {}, "Overview"), cards, h("div", { class: "row" }, h("h2", {}, "Curves"), legend, picker), charts);
  let chosen = [];
  const keep = (names) => board.go("overview", { ...board.params(), m: names.join(",") }, true);
  picker.addEventListener("change", () => keep([...chosen, picker.value]));

  async function update(params, fresh) {
    const known = (await board.get("metrics")).names;
    chosen = params.m ? params.m.split(",") : FIRST.filter((name) => known.includes(name));
    if (!params.m && !chosen.length) chosen = known.slice(0, 6);
    const answer = await board.get("metrics", { names: [...new Set([...chosen, ...FIRST.slice(0, 2)])].join(",") });
    if (!fresh()) return;
    const { runs } = board.state();
    const names = board.names();
    replace(cards, runs.map((run, n) => {
      const last = (name) => answer.runs[n][name]?.y.at(-1) ?? null;
      return [
        card("steps", run.num_steps ? `${number(run.steps)} of ${number(run.num_steps)}` : number(run.steps), runs.length > 1 ? names[n] : run.stage ?? ""),
        card("rollouts", number(run.rollouts), `of ${number(run.problems)} problems`),
        card("mean reward", number(last("reward/mean")), "of the newest step"),
        card("solved", percent(last("reward/solved_frac")), "of the newest step"),
      ].map((one) => { one.classList.add(`of-run-${n}`); return one; });
    }));
    replace(legend, runs.length > 1 ? names.map((name, n) => h("span", { class: `key curve-${n}` }, name)) : null);
    replace(picker, h("option", { value: "" }, "add a curve …"),
      known.filter((name) => !chosen.includes(name)).map((name) => h("option", { value: name }, name)));
    replace(charts, chosen.length ? chosen.map((name) => lineChart(name,
      answer.runs.map((run, n) => ({ name: names[n], ...(run[name] ?? { x: [], y: [] }) })),
      h("button", { class: "quiet", type: "button", title: `Remove ${name}`, "aria-label": `Remove ${name}`,
        onclick: () => keep(chosen.filter((other) => other !== name)) }, "×")))
      : h("p", { class: "empty" }, "No metrics yet. Curves appear with the first line of metrics.jsonl; rollouts may be there before: ",
        h("a", { href: link("rollouts") }, "see them"), "."));
  }
  return { update };
}

function card(name, value, words) {
  return h("div", { class: "fact" }, h("b", {}, value), h("span", {}, name), h("small", {}, words));
}
