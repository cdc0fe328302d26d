/** The chart of a plan: layers x density, the tiles of one layer, and what the last run measured. Plain DOM and SVG. */

import { make } from "./elements.js";
import { density, FULL, headCount, headGroups, isFull, patternName } from "./pattern.js";
import { layersByName, readableName, sparsePatterns } from "./pattern_figures.js";
import { layerPattern } from "./plan_text.js";
import { STYLE } from "./plan_style.js";
import { MOST_MAPS, percent, tileMaps } from "./tile_maps.js";

const COLORS = 6; // of --pattern-N in the style
const KEYS = { ArrowLeft: -1, ArrowRight: 1, ArrowDown: -1, ArrowUp: 1, PageUp: 5, PageDown: -5, Home: -1e9, End: 1e9 };
const LEAST_HEIGHT = 26; // px, until it is on the page; then `height` is what the content takes at the node's width
const LEAST_WIDTH = 150;
export const MOST = 256; // latent frames or layers of a preview
const short = (value) => (value < 100 ? Number(value.toPrecision(3)) : Math.round(value));

export class PlanChart {
  /**
   * @param {(key: string, values?: object) => string} say the texts in the user's language
   * @param {{cycle: Function, writeOut: Function, setFrames: Function, setDepth: Function, grown: Function}} actions
   *   what the user asks for, and by how many px the height has changed
   */
  constructor(say, actions) {
    this.say = say;
    this.actions = actions;
    this.chosen = null; // the layer that the user chose
    this.hovered = null;
    this.element = make("div", { class: "evdit-plan-chart" });
    const root = this.element.attachShadow({ mode: "open" });
    this.summary = make("div", { class: "summary" });
    this.bars = make("svg", { class: "bars", role: "listbox", tabindex: "0", preserveAspectRatio: "none" });
    this.columns = []; // of a layer each: its option of the list, and in that the share that it computes
    this.lines = make("g", {}); // over the columns
    this.axis = make("div", { class: "axis", "aria-hidden": "true" });
    this.legend = make("div", { class: "legend" });
    this.maps = make("div", { class: "maps", role: "group" });
    this.detail = make("div", { class: "detail" });
    this.controls = make("div", { class: "controls" });
    this.framesField = this.numberField("frames", (value) => this.actions.setFrames(value));
    this.depthField = this.numberField("depth", (value) => this.actions.setDepth(value));
    this.button = make("button", { type: "button" });
    this.button.addEventListener("click", () => this.actions.writeOut());
    this.measured = make("div", { class: "measured", role: "status" });
    this.live = make("div", { class: "unseen", "aria-live": "polite" });
    this.layer = make("div", { class: "layer" }, this.maps, this.detail);
    this.body = make("div", { class: "body" }, this.bars, this.axis, this.legend, this.layer, this.controls, this.measured);
    const panel = make("div", { class: "panel", role: "group" }, this.summary, this.body, this.live);
    this.panel = panel;
    root.append(make("style", {}, STYLE), panel);
    this.height = LEAST_HEIGHT;
    new ResizeObserver(() => this.measure()).observe(panel);
    this.bars.addEventListener("keydown", (event) => this.onKey(event));
    this.bars.addEventListener("pointerleave", () => this.hover(null));
    // A click edits; it must not start to drag the node. Other buttons are the canvas's.
    panel.addEventListener("pointerdown", (event) => event.button === 0 && event.stopPropagation());
  }

  measure() {
    if (this.panel.offsetWidth < LEAST_WIDTH) return; // not on the page, or folded: everything would wrap
    const before = this.height;
    this.height = this.panel.offsetHeight;
    this.actions.grown(this.height - before);
  }

  /**
   * Draw anew.
   * @param {{plan?: object, note?: string, wrong?: boolean, frames: number, depth: number, editable: boolean,
   *          fixedFrames: boolean, runs?: {report: object, earlier: boolean, title: string}[]}} state a plan, or a note that says
   *   why there is none: what is wrong
   */
  draw(state) {
    this.state = state;
    this.panel.setAttribute("aria-label", this.say("title"));
    this.body.hidden = !state.plan;
    this.summary.textContent = state.note ?? "";
    this.summary.classList.toggle("note", !state.plan);
    this.summary.classList.toggle("wrong", !!state.wrong);
    if (!state.plan) return;
    this.patterns = [...Array(state.depth).keys()].map((i) => layerPattern(state.plan, i, state.depth));
    this.sparse = sparsePatterns(this.patterns, state.frames);
    // From the sparsest on, so that a denser pattern that comes or goes leaves the others their colours.
    this.colors = new Map([...this.sparse].reverse().map((pattern, i) => [pattern, `var(--pattern-${i % COLORS})`]));
    const telling = this.patterns.findIndex((pattern) => !isFull(pattern, state.frames));
    if (this.hovered >= state.depth) this.hovered = null; // the pointer may rest where a shorter plan has no layer
    this.selected = Math.min(this.chosen ?? Math.max(telling, 0), state.depth - 1);
    this.drawSummary();
    this.drawBars();
    this.drawLegend();
    this.drawLayer();
    this.drawControls();
    this.drawMeasured();
  }

  color(pattern) {
    return this.colors.get(pattern) ?? "var(--pattern-full)";
  }

  /** The share of a layer's tiles, or of some of its heads', that is computed. */
  share(pattern) {
    return density(pattern, this.state.frames);
  }

  mean() {
    return this.patterns.reduce((sum, pattern) => sum + this.share(pattern), 0) / this.patterns.length;
  }

  drawSummary() {
    const { frames, fixedFrames } = this.state;
    const length = this.say(frames === 1 ? "latentFrame" : "latentFrames", { frames });
    this.summary.textContent = this.say(fixedFrames ? "summaryMadeFor" : "summary", { density: percent(this.mean()), frames: length });
  }

  drawBars() {
    const { depth, editable } = this.state;
    if (this.columns.length !== depth) this.layColumns(depth);
    this.bars.setAttribute("aria-label", this.say(editable ? "layersEditable" : "layers"));
    for (const [i, { option, share }] of this.columns.entries()) {
      option.setAttribute("aria-label", this.layerText(i));
      share.replaceChildren(...this.bar(this.patterns[i], i));
    }
    const lines = [50, 100].map((y) => make("line", { class: "grid", x1: 0, x2: depth, y1: 100 - y, y2: 100 - y }));
    for (const { report } of this.sparseRuns()) {
      const y = 100 - 100 * report.density;
      lines.push(make("line", { class: "measured-line", x1: 0, x2: depth, y1: y, y2: y }));
    }
    this.lines.replaceChildren(...lines);
    this.bars.classList.toggle("editable", editable);
    this.axis.replaceChildren(make("span", {}, "0"), make("span", {}, this.say("axis")), make("span", {}, String(depth - 1)));
  }

  /** One column a layer. They stay while the depth does: a click on one that is drawn anew between down and up is lost. */
  layColumns(depth) {
    this.columns = [...Array(depth).keys()].map((i) => {
      const share = make("g", { class: "share" });
      const hit = make("rect", { class: "hit", x: i, y: 0, width: 1, height: 100 });
      const option = make("g", { id: `layer-${i}`, role: "option", class: "column" }, hit, share);
      option.addEventListener("pointerenter", () => this.hover(i));
      option.addEventListener("click", (event) => this.press(i, event.shiftKey));
      return { option, share };
    });
    this.bars.setAttribute("viewBox", `0 0 ${depth} 100`);
    this.bars.replaceChildren(...this.columns.map(({ option }) => option), this.lines);
  }

  /** A layer's bar, split by its groups of heads; the height of each is its part of the attention that is computed. Those without
   * a map are one piece, in the colour of the first of them. */
  bar(pattern, layer) {
    const groups = headGroups(pattern);
    const heads = headCount(groups);
    let y = 100;
    return groups.slice(0, MOST_MAPS + 1).map((group, i) => {
      const rest = i === MOST_MAPS ? y - 100 + 100 * this.share(pattern) : undefined;
      const height = rest ?? (100 * this.share(group.pattern) * group.count) / heads;
      y -= height;
      return make("rect", { class: "bar", x: layer + 0.09, y, width: 0.82, height, style: `fill: ${this.color(group.pattern)}` });
    });
  }

  /** The runs that computed a part of the attention. */
  sparseRuns() {
    return (this.state.runs ?? []).filter(({ report }) => report.density);
  }

  drawLegend() {
    const { frames } = this.state;
    const layers = layersByName(this.patterns, frames);
    const ranks = layers.has(FULL) ? [FULL, ...this.sparse] : this.sparse;
    const entries = ranks.map((pattern) => {
      const count = Number(layers.get(patternName(pattern, frames)).toFixed(1));
      return make("span", {}, make("i", { style: `background: ${this.color(pattern)}` }), `${this.nameOf(pattern)} × ${count}`);
    });
    const [first] = this.sparseRuns();
    const legend = first && this.say(first.earlier ? "earlierLegend" : "measuredLegend");
    if (first) entries.push(make("span", {}, make("i", { class: "dashed" }), legend));
    this.legend.replaceChildren(make("span", { title: this.say("legendTitle") }, this.say("legend")), ...entries);
  }

  drawLayer() {
    const { frames, editable } = this.state;
    const layer = this.hovered ?? this.selected;
    for (const [i, { option }] of this.columns.entries()) {
      option.classList.toggle("selected", i === layer);
      option.setAttribute("aria-selected", String(i === this.selected));
    }
    this.bars.setAttribute("aria-activedescendant", `layer-${this.selected}`);
    const pattern = this.patterns[layer];
    const most = Math.max(...this.patterns.map((other) => headGroups(other).length));
    this.layer.classList.toggle("heads", most > 1);
    this.maps.replaceChildren(...tileMaps(pattern, frames, most, this.say));
    this.maps.setAttribute("aria-label", this.layerText(layer));
    const key = (kind) => make("span", {}, make("i", { class: kind }), this.say(kind));
    const means = this.patterns.some((other) => other.includes("+"));
    const share = percent(this.share(pattern));
    const keeps = this.looksFirst(layer);
    this.detail.replaceChildren(
      make("b", {}, this.say("layerName", { layer })),
      make("span", {}, most > 1 ? share : `${this.nameOf(pattern)}, ${share}`), // the maps have their names
      key("reference"), key("own"), ...(means ? [key("mean")] : []), key("skipped"),
      ...(editable ? [make("em", {}, this.say(keeps ? "hintHeads" : "hint"))] : []),
    );
  }

  nameOf(pattern) {
    const { frames } = this.state;
    return isFull(pattern, frames) ? this.say("full") : readableName(pattern, frames);
  }

  layerText(layer) {
    const pattern = this.patterns[layer];
    const share = percent(this.share(pattern));
    return this.say("layerText", { layer, name: this.nameOf(pattern), density: share });
  }

  /** What shows a number of the preview. Its field stays while the chart is drawn anew: it may have the focus, or be left for the button. */
  numberField(key, act) {
    const input = make("input", { type: "number", min: 1, max: MOST });
    const name = make("span");
    const label = make("label", {}, name, input);
    input.addEventListener("change", () => {
      input.value = Math.min(MOST, Math.max(1, Math.round(Number(input.value)) || 1));
      act(Number(input.value));
    });
    // The page sees no text box in the chart: its keys, and what is pasted, would act on the graph. But Ctrl+Enter is to run it.
    for (const type of ["copy", "cut", "paste"]) input.addEventListener(type, (event) => event.stopPropagation());
    input.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) event.stopPropagation();
    });
    return (value) => {
      name.textContent = this.say(key);
      input.setAttribute("aria-label", this.say(key));
      input.title = this.say(`${key}Title`);
      if (!input.matches(":focus")) input.value = value;
      return label;
    };
  }

  drawControls() {
    const { plan, frames, depth, fixedFrames, editable } = this.state;
    const shown = [];
    if (!fixedFrames) shown.push(this.framesField(frames));
    if (!plan.layers) shown.push(this.depthField(depth));
    if (!plan.layers && editable) shown.push(this.button);
    this.button.textContent = this.say("writeOut");
    this.button.title = this.say("writeOutTitle");
    const before = [...this.controls.children];
    if (shown.length !== before.length || shown.some((field, i) => field !== before[i])) this.controls.replaceChildren(...shown);
  }

  drawMeasured() {
    const { runs = [] } = this.state;
    this.measured.hidden = !runs.length;
    this.measured.replaceChildren(...runs.flatMap((run) => this.runLines(run)).map(([title, line]) => make("span", { title }, line)));
  }

  /** What a run came to, each line with what is shown where it is too long. */
  runLines({ report, earlier, title }) {
    const { sparse, density: found, seconds, dense_step: dense, sparse_step: fast } = report;
    const told = sparse
      ? this.say("measured", { calls: sparse, density: percent(found), seconds: seconds.toFixed(1) })
      : this.say("measuredNone", { seconds: seconds.toFixed(1) });
    const line = this.say(earlier ? "earlierRun" : "lastRunLine", { line: told });
    const text = title ? this.say("runOfNode", { title, line }) : line;
    const reasons = Object.entries(report.dense ?? {}).map(([reason, count]) => `${count} ${reason}`).join(", ") || report.why;
    const why = reasons ? this.say("stayedDense", { reasons }) : "";
    const timed = fast
      ? this.say("timed", { dense: short(dense), sparse: short(fast), gain: (dense / fast).toFixed(2) })
      : "";
    // What was measured takes the place of the bound.
    const gain = report.bound && !timed
      ? this.say(report.bound < 1 ? "slower" : "bound", {
          video: percent(report.video),
          bound: Math.max(report.bound, 1 / report.bound).toFixed(2),
        })
      : "";
    return [[title || undefined, text], [timed, timed], [gain, gain], [why, why]].filter(([, each]) => each);
  }

  hover(layer) {
    this.hovered = layer;
    if (this.state?.plan) this.drawLayer();
  }

  /** Whether a click on the layer only chooses it: what its groups of heads are is lost where it gets another pattern. */
  looksFirst(layer) {
    return this.chosen !== layer && headGroups(this.patterns[layer]).length > 1;
  }

  press(layer, backwards) {
    const edits = this.state.editable && !this.looksFirst(layer);
    this.selected = this.chosen = layer;
    if (edits) this.actions.cycle(layer, backwards);
    else this.drawLayer();
    this.live.textContent = this.layerText(layer);
  }

  onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key in KEYS) {
      this.hovered = null;
      this.selected = this.chosen = Math.min(this.state.depth - 1, Math.max(0, this.selected + KEYS[event.key]));
      this.drawLayer();
      this.live.textContent = this.layerText(this.selected);
    } else if (event.key === "Enter" || event.key === " ") {
      this.press(this.selected, event.shiftKey);
    } else {
      return;
    }
    event.preventDefault();
    event.stopPropagation();
  }
}
