/** Draws the plan inside every node that gives one, and a run's text in those that report. The nodes work the same without this file. */

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { allNodes, behind, findNode } from "./graphs.js";
import { actInOpenTab, inItsTab } from "./in_its_tab.js";
import { noteReport, promptEnded } from "./last_runs.js";
import { NodeChart, listFiles } from "./node_chart.js";
import { settle } from "./node_elements.js";
import { NodeText, showsText } from "./node_text.js";
import { followTabs, placeOf } from "./tabs.js";
import { loadTexts } from "./texts.js";

const PLAN = "EVDIT_PLAN";
const REPORT = "efficient_vdit.report";
const charts = new WeakMap(); // node -> NodeChart
const nodeTexts = new WeakMap(); // node -> NodeText

/** All charts, in subgraphs too. */
const allCharts = () => [...allNodes()].map((node) => charts.get(node)).filter(Boolean);

function drawAll() {
  for (const chart of allCharts()) chart.draw();
  for (const node of allNodes()) nodeTexts.get(node)?.draw();
}

/** No widget of its own tells a node that a value which it is given has changed, or is known by now. */
function drawChanged() {
  for (const chart of allCharts()) if (chart.drawn !== chart.settings()) chart.draw();
}

/** The charts whose plan a Sparse Attention node may have run with: those behind its input, or all where the page has no such node. */
function chartsOf(report) {
  const node = findNode(report.node);
  const input = node?.inputs?.find(({ type }) => type === PLAN);
  if (!input) return allCharts();
  const origins = [...behind(node.graph, input.link, (origin) => charts.has(origin))];
  const found = origins.map((origin) => charts.get(origin.node)).filter(Boolean);
  return found.length ? found : allCharts(); // other packs' nodes bring a value without a link
}

/** Follow which nodes the prompt runs that is at work, until it has ended: which of them the page draws is asked in its own tab. */
function followPrompts() {
  let ran = new Set();
  api.addEventListener("execution_start", () => {
    ran = new Set();
  });
  api.addEventListener("executing", ({ detail }) => detail && ran.add(String(detail)));
  api.addEventListener("execution_success", ({ detail }) => {
    const ids = [...ran];
    inItsTab(detail, "execution_success", () => {
      promptEnded(detail.prompt_id, ids);
      drawAll();
    });
  });
}

app.registerExtension({
  name: "efficient_vdit.plan",
  beforeRegisterNodeDef(_, definition) {
    if (definition.name === "EVDiTLoadTilePlan") listFiles(definition.input.required.plan_name[1].evdit_plans);
  },
  async setup() {
    followTabs(actInOpenTab, () => new Map(allCharts().map((chart) => [placeOf(chart.node), chart.current()])));
    api.addEventListener("executed", ({ detail }) => {
      const [plan, text] = ["evdit_plan", "text"].map((name) => detail.output?.[name]?.[0]);
      if (!plan && !text) return;
      inItsTab(detail, "executed", (whenQueued) => {
        const node = findNode(detail.node);
        const chart = charts.get(node);
        if (plan) chart?.planMade(plan, whenQueued(chart));
        if (text) nodeTexts.get(node)?.show(text);
      });
    });
    api.addEventListener(REPORT, ({ detail }) => {
      inItsTab(detail, REPORT, (whenQueued) => {
        noteReport(detail);
        chartsOf(detail).forEach((chart) => chart.ran(detail, whenQueued(chart)));
        nodeTexts.get(findNode(detail.node))?.ran(detail);
      });
    });
    followPrompts();
    api.addEventListener("graphChanged", drawChanged);
    app.canvas.canvas.addEventListener("litegraph:set-graph", settle);
    const speak = async () => {
      await loadTexts();
      drawAll();
    };
    app.ui.settings.addEventListener("Comfy.Locale.change", speak);
    await speak();
  },
  afterConfigureGraph: drawChanged, // the nodes in a subgraph are made before it stands anywhere
  refreshComboInNodes: () => drawAll(), // R: a file may hold another plan now
  nodeCreated(node) {
    const gives = !node.subgraph && node.outputs?.some((output) => output.type === PLAN); // the node inside has the chart
    if (gives && !charts.has(node)) charts.set(node, new NodeChart(node));
    if (showsText(node.comfyClass) && !nodeTexts.has(node)) nodeTexts.set(node, new NodeText(node));
  },
});
