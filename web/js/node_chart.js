/** The plan drawn in a node that gives one: reads the node's widgets, writes its text, and shows what runs did with the plan. */

import { app } from "../../../scripts/app.js";
import { behind, findNode } from "./graphs.js";
import { isLast, lastOf, withReport } from "./last_runs.js";
import { addElement, chain, settle } from "./node_elements.js";
import { MOST, PlanChart } from "./plan_chart.js";
import { cycleLayer, formatPlan, parsePlan, writeOut } from "./plan_text.js";
import { Recent } from "./recent.js";
import { placeOf } from "./tabs.js";
import { say } from "./texts.js";

const MARGIN = 8; // px around the chart
const USUAL = { frames: 21, depth: 32 }; // of the preview, until a run or the user tells: 81 video frames, the paper's model
const runs = new Recent(); // the plan and the reports of the last run, by node and settings: undo and the page's tabs make nodes anew
const sizes = new Map(); // the latent frames and layers of the last run, by node
let files = new Map(); // the plans in Load Tile Plan's list, as text; null where only a run tells it

/** The list anew, as the server has it. */
export const listFiles = (plans) => (files = new Map(Object.entries(plans)));

/**
 * Whether the page itself sets this widget of a node once a run is queued, at times after that run's end, or it says how: what
 * is shown is still that run's.
 */
const advances = (widget, node) => widget.linkedWidgets?.length || node.widgets.some((other) => other.linkedWidgets?.includes(widget));

/**
 * Whether only the user sets this widget of a node that gives a value, and a prompt holds it: a run changes others, such as a text
 * that is shown. Its first linked one says what the page does with it.
 */
const isHeld = (widget) => widget.options?.serialize !== false && ["fixed", undefined].includes(widget.linkedWidgets?.[0]?.value);

/** A widget's value as text. Another pack's may be none that JSON can hold, such as an element of the page; its kind is said then. */
function written(value) {
  try {
    return JSON.stringify(value);
  } catch {
    return typeof value;
  }
}

/** One node and its chart. */
export class NodeChart {
  constructor(node) {
    this.node = node;
    this.chart = new PlanChart(say, {
      cycle: (layer, backwards) => this.write(cycleLayer(this.state.plan, layer, this.state.depth, this.state.frames, backwards)),
      writeOut: () => {
        this.write(writeOut(this.state.plan, this.state.depth));
        this.chart.bars.focus({ preventScroll: true }); // the button is gone
      },
      setFrames: (frames) => this.remember({ frames }),
      setDepth: (depth) => this.remember({ depth }),
      grown: (height) => this.grown(height),
    });
    const height = () => this.chart.height + 2 * MARGIN;
    const options = { getMinHeight: height, getMaxHeight: height, margin: MARGIN };
    const widget = addElement(node, "tile_plan_chart", this.chart.element, options);
    for (const source of node.widgets) if (source !== widget) chain(source, "callback", () => this.changed(source));
    for (const event of ["onConfigure", "onConnectionsChange"]) chain(node, event, () => this.draw());
    this.draw();
  }

  widget(name) {
    return this.node.widgets?.find((widget) => widget.name === name);
  }

  /** Whether another node gives this widget's value. */
  linked(name) {
    const slot = this.node.inputs?.findIndex((input) => input.widget?.name === name) ?? -1;
    return slot >= 0 && this.node.isInputConnected(slot);
  }

  /** The canvas makes a node higher where its content needs it, but never lower; Nodes 2.0 do both. */
  grown(height) {
    settle();
    const { node } = this;
    if (height < 0 && !LiteGraph.vueNodesMode) node.setSize([node.size[0], node.size[1] + height]);
    node.graph?.setDirtyCanvas(true, true);
  }

  changed(source) {
    if (!advances(source, this.node)) this.draw();
  }

  /** What a run's plan and report belong to: the node with the values that it has or is given, as far as the page knows them. */
  settings() {
    const { graph, inputs = [], widgets } = this.node;
    const own = widgets.filter((widget) => !advances(widget, this.node));
    // The plan of a text or a file is the same for every model; a search's, or the one that a model carries, is not.
    const read = this.text() || files.has(this.file());
    const links = inputs.filter((input) => input.widget || !read).map((input) => input.link);
    const given = links.flatMap((link) => [...behind(graph, link)].flatMap((origin) => origin.widgets.filter(isHeld)));
    return JSON.stringify([placeOf(this.node), ...[own, given].map((every) => every.map(({ value }) => written(value)))]);
  }

  /** The last run with these settings: its plan as text, and the reports of the attention that used it. */
  run() {
    return runs.get(this.settings()) ?? {};
  }

  /** The same for the chart: each report, whether it is of an earlier run, and the title of its node where there are several. */
  toldRuns() {
    const reports = lastOf(this.run().reports ?? []);
    const names = new Map(reports.map(({ node }) => [node, findNode(node)?.title ?? String(node)]));
    const twice = new Set(names.values()).size < names.size;
    const titleOf = (node) => (twice ? `${names.get(node)} #${node}` : names.get(node));
    return reports.map((report) => ({ report, earlier: !isLast(report), title: names.size > 1 ? titleOf(report.node) : "" }));
  }

  /** What a run that is queued now will belong to, once it has ended. */
  current() {
    return { settings: this.settings(), file: this.file(), plan: this.state.plan && formatPlan(this.state.plan) };
  }

  /** The plan's text as the user wrote it in the node; empty where another node gives it. */
  text() {
    return this.linked("text") ? "" : String(this.widget("text")?.value ?? "").trim();
  }

  /** The entry of the list that the plan is read from, if it is. */
  file() {
    return this.text() || this.linked("text") || this.linked("plan_name") ? undefined : this.widget("plan_name")?.value;
  }

  /** A widget's value, or of the one that a subgraph shows in its place; undefined where another node gives it. */
  value(name) {
    if (!this.linked(name)) return this.widget(name)?.value;
    const { link } = this.node.inputs.find((input) => input.widget?.name === name);
    const given = [...behind(this.node.graph, link)].map(({ node, widgets }) => (node.subgraph ? widgets[0]?.value : undefined));
    return new Set(given).size === 1 ? given[0] : undefined; // a subgraph may stand in several places
  }

  /** The plan's text as the widgets say it, or as a run with these settings gave it; null where neither does. */
  source() {
    const { plan: executed = null } = this.run();
    const [text, frames] = [this.value("text"), this.value("reference_frames")];
    if (this.linked("text") && text === undefined) return executed;
    const said = String(text ?? "").trim(); // a workflow's file may hold a number, or anything
    if (said) return said;
    if (this.widget("reference_frames")) return frames === undefined ? executed : `all:${frames}`;
    return files.get(this.file()) ?? executed;
  }

  /** Why there is no text: a run will tell it, or none can. */
  missing() {
    const file = this.file();
    const listed = this.widget("plan_name")?.options?.values;
    if (file === undefined || !Array.isArray(listed)) return { note: say("afterRun") };
    if (!listed.includes(file)) return { note: say("planGone", { file }), wrong: true };
    return /(\.json|\(preset\))$/.test(file) && !files.has(file) ? { note: say("planUnreadable", { file }), wrong: true } : { note: say("afterRun") };
  }

  /** The latent frames and layers of a plan that names none: those of the last run, or that the user asked for. */
  preview() {
    const kept = Object.entries(this.node.properties?.evdit_preview ?? {}); // of a file, which may say anything
    const usable = kept.filter(([, value]) => Number.isInteger(value) && value >= 1 && value <= MOST);
    return { ...USUAL, ...Object.fromEntries(usable), ...sizes.get(placeOf(this.node)) };
  }

  /** Draws anew. The error of a picture takes its place: the page could not open the workflow otherwise. */
  draw() {
    try {
      this.drawNow();
    } catch (error) {
      console.error("Efficient-vDiT", error);
      this.state = { note: String(error), wrong: true };
      this.chart.draw(this.state);
    }
  }

  drawNow() {
    const { frames, depth } = this.preview();
    const text = this.source();
    this.drawn = this.settings();
    // The text takes the place of the other; let it be seen.
    const replaced = this.widget("reference_frames") ?? this.widget("plan_name");
    if (replaced) replaced.disabled = this.linked("text") || !!this.text();
    this.state = { frames, depth, editable: false, runs: this.toldRuns() };
    if (text === null) Object.assign(this.state, this.missing());
    else {
      try {
        const plan = parsePlan(text);
        const editable = !!this.widget("text") && !this.linked("text");
        const [ownFrames, ownDepth] = [plan.frames ?? frames, plan.layers?.length ?? depth];
        Object.assign(this.state, { plan, editable, frames: ownFrames, depth: ownDepth, fixedFrames: !!plan.frames });
      } catch (error) {
        if (error.why === undefined) throw error;
        Object.assign(this.state, { note: say(error.why, error.values), wrong: true });
      }
    }
    this.chart.draw(this.state);
  }

  write(plan) {
    const widget = this.widget("text");
    this.change(() => {
      widget.value = formatPlan(plan);
      widget.callback?.(widget.value);
    });
    this.node.graph?.setDirtyCanvas(true, true);
  }

  remember(values) {
    this.change(() => {
      this.node.properties.evdit_preview = { ...this.preview(), ...values };
    });
    sizes.delete(placeOf(this.node));
    this.draw();
  }

  /** What the user changes is a step of undo, and saved: the page looks for changes before a click or a key, not after it. */
  change(act) {
    app.canvas.emitBeforeChange();
    act();
    app.canvas.emitAfterChange();
  }

  /** The page hears of a plan that the server had cached after the report of the run. `queued`: `current` of that time. */
  planMade(text, queued) {
    const { reports = [] } = runs.get(queued.settings) ?? {};
    runs.set(queued.settings, { plan: text, reports: reports.filter(({ plan }) => plan === text) });
    if (files.has(queued.file)) files.set(queued.file, text); // as it is now, whatever the page read
    this.draw();
  }

  /** What sparse attention did with a plan, if it was this one. */
  ran(report, queued) {
    const run = runs.get(queued.settings) ?? {};
    if ((run.plan ?? queued.plan) !== report.plan) return;
    runs.set(queued.settings, { ...run, reports: withReport(run.reports ?? [], report) });
    if (report.frames && report.layers) sizes.set(placeOf(this.node), { frames: report.frames, depth: report.layers });
    this.draw();
  }
}
