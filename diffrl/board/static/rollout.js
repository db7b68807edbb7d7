// One rollout in full: its denoising replayed, tests, reward, siblings.

import { h, link, number, OFF, replace, signed } from "./dom.js";
import { scale } from "./charts.js";
import { viridis, css, ink } from "./colors.js";
import { flags, rewardBar, rolloutLink, verdict } from "./table.js";

const FRAME_MS = 160, LONGEST_MS = 12000;

export function rollout(root, board) {
  let answer = null, shownKey = "", player = null;
  async function update(params, fresh) {
    const key = JSON.stringify([params.run, params.step, params.ordinal, params.sample, params.whole]);
    if (key === shownKey) return player?.to(frameOf(params, player.last), false);
    const got = await board.get("rollout", { run: params.run, step: params.step, ordinal: params.ordinal, sample: params.sample, whole: params.whole });
    if (!fresh()) return;
    player?.stop();
    [answer, shownKey] = [got, key];
    player = page(root, board, params, answer);
    player.to(frameOf(params, player.last), false);
  }
  const open = (key) => {
    if (!key) return false;
    location.hash = rolloutLink({ key }, board.params());
    return true;
  };
  return {
    update,
    close: () => player?.stop(),
    key(event) {
      if (!answer) return false;
      if (event.key === "j") return open(answer.neighbours.next);
      if (event.key === "k") return open(answer.neighbours.previous);
      if (event.key === "s") {
        const keys = answer.siblings.map((row) => row.key);
        return open(keys[(keys.indexOf(answer.row.key) + 1) % keys.length]);
      }
      return player.key(event);
    },
  };
}

const frameOf = (params, last) => (params.at === undefined ? last : Math.min(last, Math.max(0, Number(params.at) || 0)));

function page(root, board, params, answer) {
  const { row, siblings, neighbours } = answer;
  const player = denoising(board, params, row);
  const run = { run: params.run };
  const beside = (key, text) => (key ? h("a", { class: "button", href: rolloutLink({ key }, params) }, text) : h("span", { ...OFF, class: "button off" }, text));
  replace(root,
    h("div", { class: "row" }, h("h1", {}, row.problem, h("small", {}, ` step ${number(row.step)} · sample ${number(row.sample)}`)),
      h("span", { class: "beside" }, beside(neighbours.previous, "↑ k"), beside(neighbours.next, "↓ j"))),
    h("p", { class: "lead links" }, verdict(row.verdict), flags(row.flags, board.state().heuristics),
      h("a", { href: link("problem", { ...run, id: row.problem }) }, "this problem over time"),
      h("a", { href: link("rollouts", { ...run, problem: row.problem, step_min: row.step, step_max: row.step }) }, "its rollouts of this step")),
    h("div", { class: "split" },
      h("div", {},
        h("section", { class: "card" }, h("h2", {}, "Completion"), player.element),
        h("section", { class: "card" }, h("h2", {}, "Prompt"), pre(row.prompt ?? "not recorded"))),
      h("div", {}, reward(row, answer.weights), tests(row), facts(row))),
    h("section", {}, h("h2", {}, `The group: ${siblings.length} siblings, by sample`),
      h("div", { class: "siblings" }, siblings.map((one) => sibling(one, row.key, params)))));
  return player;
}

function pre(text, attributes = {}) {
  return h("pre", { tabIndex: 0, ...attributes }, text);
}

function sibling(row, own, params) {
  const share = Math.max(-1, Math.min(1, (row.advantage ?? 0) / 2));
  const bar = h("i", { class: share < 0 ? "minus" : "plus" });
  bar.style.width = `${Math.abs(share) * 50}%`;
  bar.style.left = `${share < 0 ? 50 + share * 50 : 50}%`;
  return h("article", { class: "card sibling", "aria-current": row.key === own ? "true" : null },
    h("h3", {}, h("a", { href: rolloutLink(row, params) }, `sample ${row.sample}`), verdict(row.verdict)),
    h("p", { class: "advantage" }, `reward ${number(row.reward)} · advantage ${signed(row.advantage)}`,
      h("span", { class: "advantage-bar", "aria-hidden": "true" }, bar)),
    pre(row.completion ?? "not recorded", { "aria-label": `completion of sample ${row.sample}` }));
}

function reward(row, weights) {
  const names = [...new Set(["pass_rate", "format", ...Object.keys(weights)])];
  const line = (name) => {
    const value = row[name] ?? null, weight = weights[name] ?? null;
    const product = value === null || weight === null ? null : value * weight;
    return h("tr", {}, h("th", { scope: "row" }, name.replaceAll("_", " ")), h("td", {}, number(value)),
      h("td", {}, weight === null ? "–" : `× ${number(weight)}`), h("td", {}, number(product)));
  };
  return h("section", { class: "card" }, h("h2", {}, "Reward"), row.valid ? [
    rewardBar(row.reward), h("table", { class: "small" }, h("tbody", {}, names.map(line))),
    h("p", { class: "hint" }, `advantage ${signed(row.advantage)} against the siblings` + (Object.keys(weights).length ? ""
      : "; the run's config.yaml names no weights")),
  ] : h("p", {}, "The judge failed on this completion: it was left out of its group, and never paid 0."));
}

function tests(row) {
  const statuses = row.statuses ?? [], texts = row.tests.length === statuses.length ? row.tests : [];
  const line = (status, n) => h("li", {}, h("span", { class: "n" }, `test ${n + 1}`), verdict(status),
    texts.length ? pre(texts[n]) : null, row.details[n] ? h("p", { class: "said" }, row.details[n]) : null);
  return h("section", { class: "card" }, h("h2", {}, "Graded tests"),
    statuses.length ? h("ol", { class: texts.length ? "tests with-text" : "tests" }, statuses.map(line)) : h("p", {}, row.statuses === null ? "Not judged." : "None recorded."),
    row.detail && !row.details.includes(row.detail) ? [h("h3", {}, "What the judge said"), pre(row.detail)] : null,
    h("p", { class: "hint" }, "Tests that were shown to the model are in the prompt, and not graded."));
}

function facts(row) {
  const pairs = [["policy version", number(row.policy_version)], ["staleness", number(row.staleness)], ["trust", row.trust], ["tokens", number(row.length)],
    ["family", row.family || "–"], ["judge's CPU", row.cpu_s === null ? "–" : `${number(row.cpu_s)} s`], ["seed", row.seed ?? "–"]];
  return h("section", { class: "card" }, h("h2", {}, "Facts"), h("dl", { class: "facts" }, pairs.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])));
}

function plain(board, params, row, words) {
  const shown = (row.completion ?? "").length;
  const rest = row.num_characters > shown ? h("p", {}, h("a", { class: "button", href: link("rollout", { ...params, whole: 1 }) },
    `show all ${number(row.num_characters)} characters`)) : null;
  return [words ? h("p", { class: "hint" }, words) : null, pre(row.completion ?? "not recorded", { class: "code" }), rest];
}

// The completion with its tokens in the colours of the steps that revealed them, and the replay.
function denoising(board, params, row) {
  const tokens = row.tokens;
  const none = { last: 0, to() {}, stop() {}, key: () => false };
  if (!tokens || !tokens.ids.length) return { ...none, element: h("div", {}, plain(board, params, row, "No denoising steps were recorded.")) };
  if (!tokens.texts) {
    return { ...none, element: h("div", {}, plain(board, params, row, "The texts of single tokens need the run's tokenizer, which is written with its first " +
      "checkpoint or model. Until then name a folder: diffrl board RUN --tokenizer FOLDER.")) };
  }
  const steps = [...new Set(tokens.steps)].sort((a, b) => a - b);
  const frames = new Map(steps.map((step, n) => [step, n + 1]));
  const last = steps.length;
  const detail = h("output", { class: "detail", "aria-live": "polite" }, "Point at a token, or walk over them with Tab and the arrows.");
  const tell = (n) => {
    const p = tokens.probability?.[n] ?? null;
    detail.textContent = `token ${n + 1} of ${tokens.ids.length} · ${JSON.stringify(spans[n].textContent)} · revealed at step ${tokens.steps[n] + 1} · ` +
      `probability ${p === null ? "not recorded" : p.toFixed(3)} · id ${tokens.ids[n]}`;
  };
  const spans = tokens.texts.map((text, n) => h("span", { class: /^<\|.*\|>$/.test(text) ? "tok special" : "tok", tabIndex: n ? -1 : 0,
    onpointerenter: () => tell(n), onfocus: () => tell(n) }, text));
  const slider = h("input", { type: "range", min: "0", max: String(last), "aria-label": "Denoising step", class: "slider" });
  const play = h("button", { type: "button", class: "play" }, "Play");
  const where = h("output", { class: "where" });
  const mode = h("select", { "aria-label": "Colour by" }, h("option", { value: "step" }, "step"), h("option", { value: "confidence" }, "confidence"));
  const legend = h("span", {});
  const code = h("pre", { class: "code tokens", "aria-label": "completion, token by token" }, spans);
  let now = last, timer = null;

  function paint() {
    const by = mode.value;
    replace(legend, by === "step" ? scale("first", "last") : scale("unsure", "sure"));
    spans.forEach((span, n) => {
      const share = by === "step" ? (frames.get(tokens.steps[n]) - 1) / Math.max(1, last - 1) : tokens.probability?.[n] ?? 0;
      const color = viridis(share);
      span.style.setProperty("--step", css(color));
      span.style.setProperty("--ink", ink(color));
    });
  }
  function to(frame, noted = true) {
    now = Math.min(last, Math.max(0, frame));
    slider.value = String(now);
    let shown = 0;
    spans.forEach((span, n) => {
      const its = frames.get(tokens.steps[n]);
      shown += its <= now;
      span.classList.toggle("masked", its > now);
      span.classList.toggle("new", its === now && now < last);
    });
    where.textContent = now ? `after step ${steps[now - 1] + 1} · ${shown} of ${spans.length} tokens` : "start: everything is masked";
    slider.setAttribute("aria-valuetext", where.textContent);
    if (noted) board.note("rollout", { ...board.params(), at: now === last ? "" : now });
  }
  function stop() {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
  }
  function toggle() {
    if (timer !== null) return stop();
    if (now >= last) to(0);
    play.textContent = "Stop";
    timer = setInterval(() => { to(now + 1); if (now >= last) stop(); }, Math.max(16, Math.min(FRAME_MS, LONGEST_MS / last)));
  }
  play.addEventListener("click", toggle);
  slider.addEventListener("input", () => { stop(); to(Number(slider.value)); });
  mode.addEventListener("change", paint);
  paint();
  const window_ = tokens.window > spans.length ? ` The window had ${number(tokens.window)} tokens; those behind the end token are left out.` : "";
  return {
    last, to, stop,
    key(event) {
      const on = spans.indexOf(document.activeElement);
      const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (move && on >= 0) {
        const next = spans[Math.min(spans.length - 1, Math.max(0, on + move))];
        spans[on].tabIndex = -1;
        next.tabIndex = 0;
        next.focus();
        return true;
      }
      if (event.key === " " && event.target.closest?.("button, a, summary")) return false;
      const act = { " ": toggle, Home: () => to(0), End: () => to(last), ArrowRight: () => to(now + 1), ArrowLeft: () => to(now - 1) }[event.key];
      if (!act) return false;
      if (event.key !== " ") stop();
      act();
      return true;
    },
    element: h("div", {},
      h("div", { class: "player" }, play, slider, where),
      h("div", { class: "player under" }, h("label", {}, "colour by ", mode), legend),
      code, detail, h("p", { class: "hint" }, `Hatched tokens are still masked.${window_}`),
      tokens.texts.join("").startsWith(row.completion ?? "") ? null
        : plain(board, params, row, "Joined, these tokens are not the text that was judged, which is:")),
  };
}
