const scrolls = new ResizeObserver(entries => {
  for (const {target} of entries)
    target.tabIndex = target.scrollWidth > target.clientWidth || target.scrollHeight > target.clientHeight ? 0 : -1;
});
document.querySelectorAll('.scroll').forEach(box => scrolls.observe(box));

// one tab stop for all tokens: arrows move among them, as in any listbox
for (const map of document.querySelectorAll('[role=listbox]')) {
  const tokens = [...map.children], panel = document.getElementById(map.id + '-panel');
  const steps = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity};
  const show = token => { panel.textContent = (token.ariaLabel || `"${token.textContent}"`) + ': ' + token.title; };
  map.addEventListener('keydown', event => {
    if (!(event.key in steps)) return;
    event.preventDefault();
    const next = tokens.indexOf(document.activeElement) + steps[event.key];
    tokens[Math.max(0, Math.min(tokens.length - 1, next))].focus();
  });
  map.addEventListener('focusin', event => {
    for (const token of tokens) {
      token.tabIndex = token === event.target ? 0 : -1;
      token.ariaSelected = token === event.target;
    }
    show(event.target);
  });
  map.addEventListener('pointerover', event => { if (event.target !== map) show(event.target); });
}
