// Pages follow the chain: with each block that has come, what is on the page is read again. Without this they still work.
"use strict";

const QUIET_MS = 2000;
let pending = false;
let last = 0;

async function refresh() {
  const main = document.querySelector("main[data-live]");
  // Nothing moves under the hands of whoever types, selects or has opened something.
  const busy = main === null || document.hidden || main.contains(document.activeElement) && document.activeElement !== main
    || main.querySelector("details[open]") !== null || String(window.getSelection()) !== "";
  if (busy || pending || Date.now() - last < QUIET_MS) return;
  pending = true;
  last = Date.now();
  try {
    const response = await fetch(location.href, { headers: { Accept: "text/html" } });
    if (response.ok) {
      const page = new DOMParser().parseFromString(await response.text(), "text/html");
      const fresh = page.querySelector("main");
      if (fresh !== null && fresh.innerHTML !== main.innerHTML) main.replaceChildren(...fresh.childNodes);
      const head = page.getElementById("head");
      if (head !== null) document.getElementById("head").replaceChildren(...head.childNodes);
    }
  } catch {
    // The gateway is away: the page stays as it is.
  } finally {
    pending = false;
  }
}

if (document.querySelector("main[data-live]") !== null) {
  const source = new EventSource("/live");
  source.addEventListener("block", refresh);
  window.addEventListener("pagehide", () => source.close());
}
