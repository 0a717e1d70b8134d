// The dialog that asks for the API key. It stays in this tab's session storage and goes nowhere but to the service.

import { ask } from "./dialog.js";
import { h } from "./dom.js";
import { t } from "./i18n.js";

/** The key, or "" where the person gives none. */
export async function askForKey(isWrong) {
  const label = t("key_label");
  const input = h("input", { type: "password", autocomplete: "off", "aria-label": label, testid: "key-input" });
  const text = h("p", { text: isWrong ? t("key_wrong") : t("key_needed") });
  const said = await ask({ title: t("key_title"), content: [text, input], ok: t("key_ok") });
  return said ? input.value.trim() : "";
}
