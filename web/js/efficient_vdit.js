/** Draws the plan inside every node that gives one. The nodes work the same without this file. */

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { PlanChart } from "./plan_chart.js";
import { cycleLayer, formatPlan, parsePlan, writeOut } from "./plan_text.js";

const PLAN = "EVDIT_PLAN";
const REPORT = "efficient_vdit.report";
const MARGIN = 8; // px around the chart
const USUAL = { frames: 21, depth: 32 }; // of the preview, until a run tells: 81 video frames, the paper's model
const charts = new WeakMap(); // node -> NodeChart
let texts = {};

/** A text of locales/<language>/main.json with its {values} filled in. */
function say(key, values = {}) {
  return (texts[key] ?? key).replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

async function loadTexts() {
  const all = await (await api.fetchApi("/i18n")).json();
  const language = app.extensionManager.setting.get("Comfy.Locale");
  texts = { ...all.en?.efficientVDiT, ...all[language]?.efficientVDiT };
}

/** One node and its chart: reads the node's widgets, writes the text widget. */
class NodeChart {
  constructor(node) {
    this.node = node;
    this.executed = null; // the plan as the last run gave it, where the widgets do not say it
    this.measured = undefined;
    this.chart = new PlanChart(say, {
      cycle: (layer, backwards) => this.write(cycleLayer(this.state.plan, layer, this.state.depth, this.state.frames, backwards)),
      writeOut: () => this.write(writeOut(this.state.plan, this.state.depth, this.state.frames)),
      setFrames: (frames) => this.remember({ frames }),
      setDepth: (depth) => this.remember({ depth }),
    });
    const options = { serialize: false, hideOnZoom: false, getValue: () => "", setValue: () => {} };
    options.getMinHeight = () => this.chart.height + 2 * MARGIN;
    options.margin = MARGIN;
    const widget = node.addDOMWidget("tile_plan_chart", "tile_plan_chart", this.chart.element, options);
    widget.serialize = false;
    for (const source of node.widgets) if (source !== widget) chain(source, "callback", () => this.changed(source));
    for (const event of ["onConfigure", "onConnectionsChange"]) chain(node, event, () => this.draw());
    this.draw();
  }

  widget(name) {
    return this.node.widgets?.find((widget) => widget.name === name);
  }

  /** Whether another node gives this widget's value. */
  linked(name) {
    return this.node.inputs?.some((input) => input.widget?.name === name && input.link != null);
  }

  changed(source) {
    // The page sets a seed itself once a run is queued, at times after that run's end: what is shown is still that run's.
    if (source.linkedWidgets?.length) return;
    if (source.name !== "text") this.executed = null;
    this.measured = undefined;
    this.draw();
  }

  /** The plan's text as the widgets say it, or as the last run gave it; null where neither does. */
  source() {
    if (this.linked("text") || this.linked("reference_frames")) return this.executed;
    const text = String(this.widget("text")?.value ?? "").trim();
    const uniform = this.widget("reference_frames");
    return text || (uniform ? `all:${uniform.value}` : this.executed);
  }

  draw() {
    const { frames, depth } = { ...USUAL, ...this.node.properties?.evdit_preview };
    const text = this.source();
    // The text takes the place of reference_frames; let it be seen.
    const uniform = this.widget("reference_frames");
    if (uniform) uniform.disabled = text !== `all:${uniform.value}`;
    this.state = { frames, depth, editable: false, measured: this.measured };
    if (text === null) this.state.note = say("afterRun");
    else {
      try {
        const plan = parsePlan(text);
        const editable = !!this.widget("text") && !this.linked("text");
        const [ownFrames, ownDepth] = [plan.frames ?? frames, plan.layers?.length ?? depth];
        Object.assign(this.state, { plan, editable, frames: ownFrames, depth: ownDepth, fixedFrames: !!plan.frames });
      } catch (error) {
        if (error.part === undefined) throw error;
        this.state.note = say("unreadable", { part: error.part });
      }
    }
    this.chart.draw(this.state);
  }

  write(plan) {
    const widget = this.widget("text");
    widget.value = formatPlan(plan);
    widget.callback?.(widget.value);
    this.node.graph?.setDirtyCanvas(true, true);
  }

  remember(values) {
    this.node.properties.evdit_preview = { ...USUAL, ...this.node.properties.evdit_preview, ...values };
    this.draw();
  }

  planMade(text) {
    this.executed = text;
    this.draw();
  }

  /** What sparse attention did with this plan. */
  ran(report) {
    this.measured = report;
    if (report.frames && report.layers) this.remember({ frames: report.frames, depth: report.layers });
    else this.draw();
  }
}

function chain(object, name, after) {
  const before = object[name];
  object[name] = function (...values) {
    const result = before?.apply(this, values);
    after();
    return result;
  };
}

/** The node of an execution id; "1:2:3" is node 3 in the subgraph 2 in the subgraph 1. */
function findNode(executionId) {
  let graph = app.rootGraph ?? app.graph;
  let node;
  for (const id of String(executionId).split(":")) {
    node = graph?.getNodeById(Number(id));
    graph = node?.subgraph;
  }
  return node;
}

/** All charts, in subgraphs too. */
function* allCharts(graph = app.rootGraph ?? app.graph) {
  for (const node of graph.nodes) {
    if (charts.has(node)) yield charts.get(node);
    if (node.subgraph) yield* allCharts(node.subgraph);
  }
}

/** The charts that show the plan of a Sparse Attention node: by its link, else (from outside its subgraph) by the same text. */
function chartsOf(report) {
  const node = findNode(report.node);
  const slot = node?.inputs?.findIndex((input) => input.type === PLAN) ?? -1;
  const chart = slot < 0 ? undefined : charts.get(node.getInputNode(slot));
  return chart ? [chart] : [...allCharts()].filter((other) => other.state.plan && formatPlan(other.state.plan) === report.plan);
}

app.registerExtension({
  name: "efficient_vdit.plan",
  async setup() {
    api.addEventListener("executed", ({ detail }) => {
      const text = detail.output?.evdit_plan?.[0];
      if (text) charts.get(findNode(detail.node))?.planMade(text);
    });
    api.addEventListener(REPORT, ({ detail }) => chartsOf(detail).forEach((chart) => chart.ran(detail)));
    await loadTexts();
    for (const chart of allCharts()) chart.draw();
  },
  nodeCreated(node) {
    const gives = node.outputs?.some((output) => output.type === PLAN);
    if (gives && !charts.has(node)) charts.set(node, new NodeChart(node));
  },
});
