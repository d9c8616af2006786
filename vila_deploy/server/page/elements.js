// Elements of the page. Whatever comes from the server or from a file name enters as a text node.

const ICONS = {
  copy: ["M9 9h10v11H9z", "M15 9V4H5v11h4"],
  again: ["M20 11a8 8 0 1 0-2.3 5.7", "M20 4v7h-7"],
  remove: ["M6 6l12 12", "M18 6L6 18"],
  key: ["M14.5 9.5a4 4 0 1 0-4 4 4 4 0 0 0 4-4", "M13.5 12.5L20 19", "M17 16l-2 2"],
};

export const byId = (id) => document.getElementById(id);

export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  for (const d of ICONS[name]) {
    const path = document.createElementNS(svg.namespaceURI, "path");
    path.setAttribute("d", d);
    svg.append(path);
  }
  return svg;
}

export function button(name, label, onclick) {
  return element("button", { type: "button", onclick }, icon(name), element("span", {}, label));
}

// Show a line above the question; an empty one removes it.
export function say(text, isError = false) {
  byId("notice").textContent = text;
  byId("notice").classList.toggle("error", isError);
}
