"use strict";
// In the head, so that a dark page is never white first. A choice made with the button outlives the page.
const keepsightTheme = (() => {
  const KEY = "keepsight-theme";
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  try { chosen = localStorage.getItem(KEY); } catch { /* private windows keep nothing */ }
  const current = () => chosen || (prefersDark.matches ? "dark" : "light");
  const choose = (theme) => {
    chosen = theme;
    try { localStorage.setItem(KEY, theme); } catch { /* as above */ }
  };
  document.documentElement.dataset.theme = current();
  return { prefersDark, current, choose };
})();
