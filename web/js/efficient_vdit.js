/** Draws the plan inside every node that gives one. The nodes work the same without this file. */

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { PlanChart } from "./plan_chart.js";
import { cycleLayer, formatPlan, parsePlan, writeOut } from "./plan_text.js";
import { followTabs, isLoaded, openTab, tabOf } from "./tabs.js";

const PLAN = "EVDIT_PLAN";
const REPORT = "efficient_vdit.report";
const MARGIN = 8; // px around the chart
const USUAL = { frames: 21, depth: 32 }; // of the preview, until a run tells: 81 video frames, the paper's model
const CANVAS = { wheel: "processMouseWheel", pointerdown: "processMouseDown", pointermove: "processMouseMove", pointerup: "processMouseUp" };
const charts = new WeakMap(); // node -> NodeChart
const owners = new WeakMap(); // element -> its node
const runs = new Map(); // the plan and the report of the last run, by node and settings: undo and the page's tabs make nodes anew
const waiting = new Map(); // what runs of tabs that are not open told: {tab, act} by tab, event and node
let files = {}; // the plans in Load Tile Plan's list, as text
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

/** Whether the page itself sets this widget once a run is queued, at times after that run's end: what is shown is still that run's. */
const advances = (widget) => widget.linkedWidgets?.length || widget.name === "control_after_generate";

/** One node and its chart: reads the node's widgets, writes the text widget. */
class NodeChart {
  constructor(node) {
    this.node = node;
    this.chart = new PlanChart(say, {
      cycle: (layer, backwards) => this.write(cycleLayer(this.state.plan, layer, this.state.depth, this.state.frames, backwards)),
      writeOut: () => this.write(writeOut(this.state.plan, this.state.depth)),
      setFrames: (frames) => this.remember({ frames }),
      setDepth: (depth) => this.remember({ depth }),
      grown: (height) => this.grown(height),
    });
    owners.set(this.chart.element, node);
    const options = { serialize: false, hideOnZoom: false, hideInPanel: true, getValue: () => "", setValue: () => {} };
    // Earlier pages know this word alone, and Nodes 2.0 take it for themselves as well: there the panel keeps its empty row.
    Object.defineProperty(options, "canvasOnly", { get: () => !LiteGraph.vueNodesMode, enumerable: true });
    options.getMinHeight = options.getMaxHeight = () => this.chart.height + 2 * MARGIN;
    options.margin = MARGIN;
    const widget = node.addDOMWidget("tile_plan_chart", "tile_plan_chart", this.chart.element, options);
    widget.serialize = false;
    // The canvas hears nothing over an element: the page's own text boxes hand on the wheel and the middle button as well.
    for (const [type, method] of Object.entries(CANVAS)) {
      this.chart.element.addEventListener(type, (event) => {
        if (type !== "wheel" && event.button !== 1 && !(event.buttons & 4)) return;
        event.preventDefault();
        event.stopPropagation();
        app.canvas[method](event);
      });
    }
    for (const source of node.widgets) if (source !== widget) chain(source, "callback", () => this.changed(source));
    for (const event of ["onConfigure", "onConnectionsChange"]) chain(node, event, () => this.draw());
    chain(node, "onAdded", () => settle());
    // The canvas makes a node higher while it draws it, when the box around it is drawn already.
    chain(node, "onResize", () => node.graph?.setDirtyCanvas(true, true));
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
    if (!advances(source)) this.draw();
  }

  /** What a run's plan and report belong to. */
  settings() {
    return JSON.stringify([openTab(), this.node.graph?.id, this.node.id, this.node.widgets.filter((w) => !advances(w)).map((w) => w.value)]);
  }

  /** The last run with these settings: its plan as text, and the report of the attention that used it. */
  run() {
    return runs.get(this.settings()) ?? {};
  }

  /** The plan's text as the widgets say it, or as a run with these settings gave it; null where neither does. */
  source() {
    const { plan: executed = null } = this.run();
    if (this.linked("text") || this.linked("reference_frames")) return executed;
    const text = String(this.widget("text")?.value ?? "").trim();
    if (text) return text;
    const uniform = this.widget("reference_frames");
    if (uniform) return `all:${uniform.value}`;
    return this.linked("plan_name") ? executed : (files[this.widget("plan_name")?.value] ?? executed);
  }

  draw() {
    const { frames, depth } = { ...USUAL, ...this.node.properties?.evdit_preview };
    const text = this.source();
    // The text takes the place of reference_frames; let it be seen.
    const uniform = this.widget("reference_frames");
    if (uniform) uniform.disabled = this.linked("text") || !!String(this.widget("text")?.value ?? "").trim();
    this.state = { frames, depth, editable: false, measured: this.run().report };
    if (text === null) this.state.note = say("afterRun");
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
    app.canvas.emitBeforeChange();
    widget.value = formatPlan(plan);
    widget.callback?.(widget.value);
    app.canvas.emitAfterChange(); // a step of undo: the page looks for changes before the click, not after it
    this.node.graph?.setDirtyCanvas(true, true);
  }

  remember(values) {
    this.node.properties.evdit_preview = { ...USUAL, ...this.node.properties.evdit_preview, ...values };
    this.draw();
  }

  /** The page hears of a plan that the server had cached after the report of the run. */
  planMade(text) {
    const { report } = this.run();
    runs.set(this.settings(), { plan: text, report: report?.plan === text ? report : undefined });
    this.draw();
  }

  /** What sparse attention did with this plan. */
  ran(report) {
    runs.set(this.settings(), { ...this.run(), report });
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

let settling = false;

/**
 * Nodes 2.0 keep the element of the node that had a number, when undo makes a new node of it or another graph with one is opened.
 * Puts the chart of the node that has the number now in its place, once the page has drawn what changed.
 */
function settle() {
  if (settling || !LiteGraph.vueNodesMode) return;
  settling = true;
  requestAnimationFrame(() => {
    settling = false;
    for (const element of document.querySelectorAll(".evdit-plan-chart")) {
      const shown = owners.get(element);
      const now = app.canvas.graph?.getNodeById(shown.id);
      if (now !== shown && charts.has(now)) element.replaceWith(charts.get(now).chart.element);
    }
  });
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

/** The charts that show the plan which a Sparse Attention node ran with: the one linked to it, else (from outside its subgraph) any. */
function chartsOf(report) {
  const node = findNode(report.node);
  const slot = node?.inputs?.findIndex((input) => input.type === PLAN) ?? -1;
  const linked = slot < 0 ? undefined : charts.get(node.getInputNode(slot));
  return [...(linked ? [linked] : allCharts())].filter(({ state }) => state.plan && formatPlan(state.plan) === report.plan);
}

/** Does `act` once the tab that queued the prompt is open; the same event of a later run of that tab takes its place. */
async function inItsTab({ prompt_id: promptId, node }, event, act) {
  const tab = await tabOf(promptId);
  const key = JSON.stringify([tab, event, node]);
  waiting.delete(key); // the later one goes to the end
  waiting.set(key, { tab, act });
  actInOpenTab();
}

function actInOpenTab() {
  if (!isLoaded()) return;
  const due = [...waiting].filter(([, { tab }]) => tab === openTab());
  for (const [key, { act }] of due) {
    waiting.delete(key);
    act();
  }
}

app.registerExtension({
  name: "efficient_vdit.plan",
  beforeRegisterNodeDef(_, definition) {
    if (definition.name === "EVDiTLoadTilePlan") files = definition.input.required.plan_name[1].evdit_plans;
  },
  async setup() {
    followTabs(actInOpenTab);
    api.addEventListener("executed", ({ detail }) => {
      const text = detail.output?.evdit_plan?.[0];
      if (text) inItsTab(detail, "executed", () => charts.get(findNode(detail.node))?.planMade(text));
    });
    api.addEventListener(REPORT, ({ detail }) => {
      inItsTab(detail, REPORT, () => chartsOf(detail).forEach((chart) => chart.ran(detail)));
    });
    app.canvas.canvas.addEventListener("litegraph:set-graph", settle);
    await loadTexts();
    for (const chart of allCharts()) chart.draw();
  },
  nodeCreated(node) {
    const gives = node.outputs?.some((output) => output.type === PLAN);
    if (gives && !charts.has(node)) charts.set(node, new NodeChart(node));
  },
});
