// The end stays in view while answers and question grow, unless the reader has scrolled up.

import { byId } from "./elements.js";

const scroller = byId("scroller");
let atEnd = true;

export function showEnd() {
  atEnd = true;
  scroller.scrollTop = scroller.scrollHeight;
}

export function keepEndInView() {
  const growth = new ResizeObserver(() => atEnd && showEnd());
  growth.observe(scroller);
  growth.observe(byId("turns"));
  scroller.addEventListener("scroll", () => {
    atEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 40;
  });
}
