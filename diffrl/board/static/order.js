// In which order tokens are decoded, and how that changes with training.

import { h, number, replace } from "./dom.js";
import { heatmap, lineChart } from "./charts.js";

export function order(root, board) {
  const body = h("div", {});
  root.append(h("h1", {}, "Decoding order"), h("p", { class: "lead" },
    "AR-ness is 1 where a completion is written from left to right (arXiv 2506.20639): local, how often the next token is the right-hand neighbour of the " +
    "one before; global, how often it is among the k leftmost that are still masked. Tokens of one step count by falling confidence, then from left to right."), body);
  return {
    async update(params, fresh) {
      const numbers = board.state().runs.map((_, n) => n);
      const answers = await Promise.all(numbers.map((run) => board.get("orders", { run })));
      if (!fresh()) return;
      const names = board.names();
      const measures = Object.keys(answers[0].ar_ness);
      if (answers.every((answer) => !answer.steps.length)) {
        return replace(body, h("p", { class: "empty" }, answers.some((answer) => answer.unscanned) ? "Looking at the rollouts …" : "No denoising steps are recorded."));
      }
      const { samples_per_step: samples, num_bins: bins } = answers[0];
      replace(body, h("p", { class: "hint" }, `Of up to ${samples} rollouts of each step` + (answers[0].stride > 1 ? `; every ${answers[0].stride}th step is shown.` : ".")),
        answers.length > 1 ? h("p", { class: "legend" }, names.map((name, n) => h("span", { class: `key curve-${n}` }, name))) : null,
        h("div", { class: "charts" }, measures.map((measure) => lineChart(measure,
          answers.map((answer, n) => ({ name: names[n], x: answer.steps, y: answer.ar_ness[measure] }))))),
        h("div", { class: "maps" }, answers.map((answer, n) => answer.steps.length ? heatmap(`When each part of a completion is revealed${answers.length > 1 ? `, ${names[n]}` : ""}`,
          `Training steps ${number(answer.steps[0])} to ${number(answer.steps.at(-1))} from left to right, start of the completion above; bright is revealed last.`,
          answer.steps, answer.when, bins) : null)));
    },
  };
}
