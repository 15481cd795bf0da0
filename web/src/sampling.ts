/** From logits to the next token, as transformers' `generate` chooses it. */

export interface SamplingSettings {
  /** Ids that never appear in an answer. */
  suppressed: readonly number[];
  /** 0: the most likely token. */
  temperature: number;
  /** Number of tokens to choose from; 0: all. */
  topK: number;
  /** Share of the probability to choose from. */
  topP: number;
}

/** Probability of every token, after suppression, temperature, top-k and top-p, in this order. */
export function computeProbabilities(logits: ArrayLike<number>, settings: SamplingSettings): Float64Array {
  const scores = Float64Array.from(logits);
  for (const id of settings.suppressed) scores[id] = -Infinity;
  if (settings.temperature === 0) {
    const probabilities = new Float64Array(scores.length);
    probabilities[indexOfMaximum(scores)] = 1;
    return probabilities;
  }
  for (let id = 0; id < scores.length; id++) scores[id] /= settings.temperature;
  if (settings.topK > 0 && settings.topK < scores.length) {
    const least = Float64Array.from(scores).sort()[scores.length - settings.topK];
    for (let id = 0; id < scores.length; id++) if (scores[id] < least) scores[id] = -Infinity;
  }
  const probabilities = softmax(scores);
  if (settings.topP >= 1) return probabilities;
  const order = Array.from(probabilities.keys()).sort((a, b) => scores[a] - scores[b]);
  let sum = 0;
  for (const id of order.slice(0, -1)) {
    sum += probabilities[id];
    if (sum <= 1 - settings.topP) scores[id] = -Infinity;
  }
  return softmax(scores);
}

/** Choose the next token. */
export function chooseToken(
  logits: ArrayLike<number>,
  settings: SamplingSettings,
  random: () => number = Math.random,
): number {
  const probabilities = computeProbabilities(logits, settings);
  let rest = random();
  for (let id = 0; id < probabilities.length; id++) {
    rest -= probabilities[id];
    if (rest < 0) return id;
  }
  return indexOfMaximum(probabilities); // rounding left a rest
}

function softmax(scores: Float64Array): Float64Array {
  const largest = scores[indexOfMaximum(scores)];
  const exponentials = scores.map((score) => Math.exp(score - largest));
  const sum = exponentials.reduce((total, value) => total + value, 0);
  return exponentials.map((value) => value / sum);
}

function indexOfMaximum(values: ArrayLike<number>): number {
  let best = 0;
  for (let index = 1; index < values.length; index++) if (values[index] > values[best]) best = index;
  return best;
}
