// The edits in force, each with a way back.

export default { render({ model, el }) {
  const root = node('div', 'gptoss-view gptoss-edits');
  root.setAttribute('role', 'group');
  root.setAttribute('aria-label', 'Active edits');
  el.append(root);
  const parts = { root, dress() {} };

  const put = banned => { model.set('banned', banned); model.save_changes(); painting.ask(); };
  const paint = () => {
    const banned = model.get('banned');
    const chips = banned.map(([layer, expert], i) => {
      const chip = node('button', 'gptoss-chip', `layer ${layer}: no expert ${expert}`), cross = node('span', '', '✕');
      chip.type = 'button';
      cross.setAttribute('aria-hidden', 'true');
      chip.setAttribute('aria-label', `let expert ${expert} of layer ${layer} back in`);
      chip.addEventListener('click', () => put(model.get('banned').filter((_, j) => j !== i)));
      chip.append(cross);
      return chip;
    });
    const clear = node('button', 'gptoss-chip gptoss-clear', 'Clear edits');
    clear.type = 'button';
    clear.addEventListener('click', () => put([]));
    const lead = node('span', 'gptoss-lead', banned.length ? 'Active edits' : model.get('hint'));
    root.replaceChildren(lead, ...chips, ...(banned.length ? [clear] : []));
  };

  const painting = keepPainted(model, parts, paint);
  model.on('change:banned', painting.ask);
  return () => { painting.stop(); model.off('change:banned', painting.ask); };
} };
