// The dialog with key, system message and sampling; its fields hold them, and nothing else does.

import { byId } from "./elements.js";

export function openSettings(field, message = "") {
  byId("settings-error").textContent = message;
  if (!byId("settings").open) byId("settings").showModal();
  byId(field).focus();
}

export const systemMessage = () => byId("system").value.trim();

// Fields that are left empty are not sent: the server's defaults hold. Throws for a wrong number.
export function sampling() {
  const stop = byId("stop-strings").value.split("\n").filter(Boolean);
  return {
    temperature: number("temperature", "Temperature"),
    top_p: number("top_p", "Top p"),
    max_tokens: number("max_tokens", "Max tokens"),
    stop: stop.length ? stop : undefined,
  };
}

function number(id, name) {
  const input = byId(id);
  const kind = input.step === "1" ? "a whole number" : "a number";
  if (!input.validity.valid) throw new Error(`${name} must be ${kind} ${range(input)}.`);
  return input.value === "" ? undefined : Number(input.value);
}

function range({ id, min, max }) {
  if (id === "top_p") return "above 0, at most 1";
  return max ? `from ${min} to ${max}` : `of at least ${min}`;
}

export function headers() {
  const key = byId("key").value.trim();
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

export const wrongKey = () =>
  byId("key").value
    ? "The server does not know this API key. Correct it in Settings."
    : "This server asks for an API key. Enter it in Settings.";
