// Light, dark, or as the system has it. early.js sets it before the first paint.

import { iconButton, relabel } from "./controls.js";
import { t } from "./i18n.js";
import { icon } from "./icons.js";

const KEPT = "nestling.theme";
const ICONS = { auto: "half", light: "sun", dark: "moon" };
const NAMES = Object.keys(ICONS);

/** The button that goes round the three. */
export function themeSwitch() {
  const button = iconButton("half", "", "theme-switch", () => {
    const next = NAMES[(NAMES.indexOf(document.documentElement.dataset.theme) + 1) % NAMES.length];
    localStorage.setItem(KEPT, next);
    show(next);
  });
  const show = (name) => {
    document.documentElement.dataset.theme = name;
    button.replaceChildren(icon(ICONS[name]));
    relabel(button, t("theme", { name: t(`theme_${name}`) }));
  };
  show(document.documentElement.dataset.theme in ICONS ? document.documentElement.dataset.theme : "auto");
  return button;
}
