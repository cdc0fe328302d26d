/** The chart's style, inside its shadow root. The page's colours come from ComfyUI's theme;
 * those of the data lean towards its text colour, so that they stand out on dark and on light. */

export const STYLE = `
:host { display: block; }
.panel {
  --text: var(--input-text, #ddd);
  --pattern-full: color-mix(in oklab, #e0802a 82%, var(--text)); --pattern-0: color-mix(in oklab, #2f86dc 82%, var(--text));
  --pattern-1: color-mix(in oklab, #12977f 82%, var(--text)); --pattern-2: color-mix(in oklab, #8a63dc 82%, var(--text));
  --pattern-3: color-mix(in oklab, #d44f8e 82%, var(--text)); --pattern-4: color-mix(in oklab, #8a962a 82%, var(--text));
  --pattern-5: color-mix(in oklab, #74828f 82%, var(--text));
  box-sizing: border-box; padding: 6px 8px; border-radius: 6px;
  display: flex; flex-direction: column; gap: 5px;
  background: var(--comfy-input-bg, #222); color: var(--text);
  font: 11px/1.3 Inter, system-ui, sans-serif; user-select: none;
}
[hidden] { display: none !important; }
.body { display: flex; flex-direction: column; gap: 5px; }
.summary { font-weight: 600; }
.summary.note { font-weight: 400; opacity: .85; }
.summary.wrong { color: color-mix(in oklab, var(--error-text, #f44) 75%, var(--text)); opacity: 1; overflow-wrap: anywhere; }
.bars { display: block; width: 100%; height: 60px; border-radius: 3px; outline-offset: 2px; }
.bars:focus { outline: none; }
.bars:focus-visible { outline: 2px solid var(--pattern-0); }
.bars .hit { fill: transparent; }
.bars .share { pointer-events: none; }
.bars.editable .column { cursor: pointer; }
.column.selected .hit { fill: color-mix(in srgb, currentColor 22%, transparent); }
.bars line { vector-effect: non-scaling-stroke; pointer-events: none; }
.grid { stroke: color-mix(in srgb, currentColor 25%, transparent); stroke-width: 1; }
.measured-line { stroke: currentColor; stroke-width: 1.5; stroke-dasharray: 4 3; }
.axis { display: flex; justify-content: space-between; margin-top: -4px; font-size: 10px; opacity: .75; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 9px; }
.legend span, .detail span { display: flex; align-items: center; gap: 4px; }
i { flex: none; width: 9px; height: 9px; border-radius: 2px; }
i.dashed { height: 0; border-radius: 0; border-top: 2px dashed currentColor; }
.reference { fill: var(--pattern-full); background: var(--pattern-full); }
.own { fill: var(--pattern-0); background: var(--pattern-0); }
.mean { fill: color-mix(in srgb, var(--pattern-0) 45%, transparent); background: color-mix(in srgb, var(--pattern-0) 45%, transparent); }
.skipped { fill: color-mix(in srgb, currentColor 14%, transparent); background: color-mix(in srgb, currentColor 18%, transparent); }
.layer { display: flex; gap: 8px; }
.maps { flex: none; }
.tiles { flex: none; width: 84px; height: 84px; }
figure { display: flex; flex-direction: column; min-width: 0; margin: 0; }
figure b, figure span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; font-size: 10px; }
figure.empty { visibility: hidden; }
.layer.heads { flex-direction: column; gap: 5px; }
.heads .maps {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(84px, 1fr)); gap: 5px 8px; max-height: 232px; overflow-y: auto;
}
.heads .detail { flex-flow: row wrap; gap: 2px 9px; }
.heads .detail em { flex: 0 0 100%; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.detail { display: flex; flex-direction: column; min-width: 0; line-height: 1.25; }
.detail em { font-style: normal; opacity: .75; font-size: 10px; }
.controls { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 10px; }
.controls:empty { display: none; }
label { display: flex; align-items: center; gap: 4px; }
input, button {
  font: inherit; color: inherit; background: transparent; border-radius: 4px; padding: 1px 5px;
  border: 1px solid color-mix(in srgb, currentColor 40%, transparent);
}
input { width: 30px; appearance: textfield; }
input::-webkit-inner-spin-button { appearance: none; }
button { cursor: pointer; }
button:hover { background: color-mix(in srgb, currentColor 12%, transparent); }
.measured { display: flex; flex-direction: column; border-top: 1px solid color-mix(in srgb, currentColor 25%, transparent); padding-top: 4px; }
.measured span + span { opacity: .75; font-size: 10px; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
`;
