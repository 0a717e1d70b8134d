// The page's words: one file of texts per language, chosen by the browser unless the person chose.

const LANGUAGES = { en: "English", zh: "中文" };
const KEPT = "nestling.language";
let texts = {};

/** The language that is shown: "en" or "zh". */
export const language = localStorage.getItem(KEPT) || (navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en");

/** Load the texts; nothing is shown before. */
export async function loadTexts() {
  const response = await fetch(`/page/strings/${language}.json`);
  texts = await response.json();
  document.documentElement.lang = language === "zh" ? "zh-Hans" : language;
}

/** The text for a key; {name} in it becomes values.name. */
export function t(key, values = {}) {
  const text = texts[key] ?? key;
  return text.replace(/\{(\w+)\}/g, (whole, name) => (name in values ? String(values[name]) : whole));
}

/** The other language's own name. */
export function otherLanguage() {
  return LANGUAGES[other()];
}

/** Show the page in the other language; it is loaded again, since every text of it changes. */
export function switchLanguage() {
  localStorage.setItem(KEPT, other());
  location.reload();
}

function other() {
  return language === "en" ? "zh" : "en";
}
