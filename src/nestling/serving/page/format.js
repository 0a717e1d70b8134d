// Numbers and times in the language of the page.

import { language, t } from "./i18n.js";

const DAY = 86_400_000;

/** 3500000 as "3.5M" or "350万". */
export function short(number) {
  return new Intl.NumberFormat(language, { notation: "compact", maximumFractionDigits: 1 }).format(number);
}

/** A number with at most so many digits after the point. */
export function decimal(number, digits = 0) {
  return new Intl.NumberFormat(language, { maximumFractionDigits: digits }).format(number);
}

/** exp(logprob) as a percentage; small ones keep two digits that mean something. */
export function percent(logprob) {
  const share = Math.exp(logprob);
  const options = { style: "percent", maximumSignificantDigits: share < 0.1 ? 2 : 3 };
  return share < 1e-6 ? "<0.0001%" : new Intl.NumberFormat(language, options).format(share);
}

/** The part of the list that a conversation stands in: its key among the texts. */
export function period(seconds, now = Date.now()) {
  const midnight = new Date(now).setHours(0, 0, 0, 0);
  const days = Math.ceil((midnight - seconds * 1000) / DAY);
  if (days <= 0) return "today";
  if (days === 1) return "yesterday";
  return days <= 7 ? "last_week" : "older";
}

/** A day and a time of day. */
export function moment(seconds) {
  return new Intl.DateTimeFormat(language, { dateStyle: "medium", timeStyle: "short" }).format(seconds * 1000);
}

/** "0.42 s" */
export function duration(seconds) {
  return t("seconds", { n: decimal(seconds, seconds < 10 ? 2 : 0) });
}
