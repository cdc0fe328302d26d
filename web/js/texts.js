/** The texts of locales/<language>/main.json in the language of the page. */

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

let texts = {};

/** A text with its {values} filled in. */
export function say(key, values = {}) {
  return (texts[key] ?? key).replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

export async function loadTexts() {
  const all = await (await api.fetchApi("/i18n")).json();
  const language = app.extensionManager.setting.get("Comfy.Locale");
  texts = { ...all.en?.efficientVDiT, ...all[language]?.efficientVDiT };
}
