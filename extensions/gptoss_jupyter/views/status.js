// The headline: which model this is, what is going on, what went wrong.

export default { render({ model, el }) {
  const root = node('div', 'gptoss-view gptoss-status'), name = node('span', 'gptoss-name');
  const facts = node('span', 'gptoss-facts'), pulse = node('span', 'gptoss-pulse'), said = node('span', 'gptoss-message-line');
  const bar = node('progress', 'gptoss-progress');
  said.setAttribute('role', 'status');
  said.setAttribute('aria-live', 'polite');
  bar.setAttribute('aria-label', 'progress');
  root.append(name, facts, pulse, bar, said);
  el.append(root);
  const parts = { root, dress() {} };

  const paint = () => {
    name.textContent = model.get('name');
    facts.textContent = model.get('facts');
    pulse.textContent = model.get('pulse');
    root.dataset.level = model.get('level');
    if (said.textContent !== model.get('message')) said.textContent = model.get('message');
    const progress = model.get('progress');
    bar.hidden = progress < 0;
    bar.value = Math.max(0, progress);
  };

  const painting = keepPainted(model, parts, paint);
  return () => painting.stop();
} };
