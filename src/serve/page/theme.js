// Applies the chosen appearance before the page is first drawn. A classic script, since modules run too late for that.
(() => {
  try {
    const theme = localStorage.getItem("aotron.theme");
    if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  } catch {
    // Without storage the page looks as the system does.
  }
})();
