// The routes of one token: per layer, the experts chosen and how the router divided the weight among them.

export default { render({ model, el }) {
  const parts = panel(el, model, 'gptoss-routes');
  const table = node('table', 'gptoss-route-table');
  table.setAttribute('aria-labelledby', parts.title.id);
  parts.body.classList.add('gptoss-tall');
  parts.body.append(table);

  const paint = () => {
    const dark = isDark(), height = model.get('row_height'), room = parts.body.clientWidth - 28;
    table.replaceChildren(...model.get('rows').map(([layer, slots]) => {
      const row = node('tr'), name = node('th', '', String(layer)), cell = node('td'), bar = node('div', 'gptoss-shares');
      name.scope = 'row';
      row.style.height = `${height}px`;
      bar.style.height = `${height - 1}px`;
      for (const [expert, weight] of slots) {
        const piece = node('span', 'gptoss-share'), colour = shade(weight, dark);
        const wide = weight * room;   // what does not fit is left out whole; the tip has it
        if (wide > 24) piece.append(node('b', '', `E${expert}`));
        if (wide > 58) piece.append(node('span', '', weight.toFixed(2)));
        piece.style.flexGrow = Math.max(weight, 0.001);
        piece.style.backgroundColor = css(colour);
        piece.style.color = ink(colour);
        piece.setAttribute('role', 'img');
        piece.title = `layer ${layer}: expert ${expert}, weight ${number(weight)}`;
        bar.append(piece);
      }
      cell.append(bar);
      row.append(name, cell);
      return row;
    }));
    parts.legend.textContent = model.get('note');
    parts.detail.textContent = model.get('hint');
  };

  table.addEventListener('mouseover', event => {
    const piece = event.target.closest?.('.gptoss-share');
    parts.detail.textContent = piece ? piece.title : model.get('hint');
  });
  table.addEventListener('mouseleave', () => { parts.detail.textContent = model.get('hint'); });

  const painting = keepPainted(model, parts, paint);
  return () => painting.stop();
} };
