"""The words that reports and messages use, each in a sentence or two: what ``rotq explain``
prints.
"""

from __future__ import annotations

TERMS = {
    "amax": "The largest magnitude that was seen of a tensor; a scale is amax divided by the"
    " largest value of the number format (127 for int8).",
    "artifact": "What 'rotq calibrate' writes: the quantized model, numbers and scales, before any"
    " runtime has shaped it. 'rotq export --from-artifact' writes it for one.",
    "awq": "Scales found by a search that protect the weights which large inputs meet, folded into"
    " what comes before (--smoothing awq).",
    "backend": "What writes a format: onnx for graphs, safetensors for bundles of tensors"
    " (--backend). It has targets.",
    "block": "So many consecutive input features of a weight that share one scale (--block-size);"
    " smaller blocks lose less and are a little larger.",
    "bound": "What a figure of the parity check may be at most; a figure beyond it fails the export"
    " (exit code 3).",
    "calibration": "Running text through the model to find limits of activations (amax), and what"
    " rounding weights well takes.",
    "capture": "Streamed statistics of activations that rotations are trained on; bounded in memory"
    " and disk.",
    "floor": "A difference that is there however right everything is: what summing in another order"
    " (split-sum floor) or a shorter dtype (naive floor) makes in torch. Bounds of rung 2 are twice"
    " the floor.",
    "fold": "To multiply something into the weights beforehand, so that it costs nothing at run"
    " time: gains of norms, R1, R2, scales of smoothing. Rung 1 proves that it changes nothing.",
    "gate": "The comparison of candidates (rotations, prefix, smoothing, wider inputs) on held-out"
    " rows; the one with the lowest KL is kept, also if that is to change nothing.",
    "gptq": "Rounding weights one column after the other, where later ones make up for the errors"
    " of earlier ones, as far as the calibration text tells (--weight-algorithm gptq).",
    "kl": "Mean Kullback-Leibler divergence of a token's prediction, original against quantized, in"
    " nats: about the logarithm of the ratio of perplexities.",
    "massive tokens": "A few tokens, often the first, whose activations are hundreds of times the"
    " others'; a static scale has to hold them, and drowns the rest.",
    "observer": "What turns the activations that calibration saw into limits: min_max, percentile,"
    " entropy, mse (--observer).",
    "online": "Of a rotation: computed while the model runs (R3, R4), because nothing that it could"
    " be folded into lies before it.",
    "parity": "The proof that what was written computes what it should, in four rungs; it runs with"
    " every export unless --no-verify.",
    "perplexity": "The exponential of the mean negative log-likelihood of a token: of how many"
    " equally likely tokens the model is as unsure. Lower is better.",
    "prefix": "Tokens whose keys and values stand before every sequence as part of the model, so"
    " that no token of the text becomes a massive one (--prefix).",
    "qdq": "QuantizeLinear and DequantizeLinear nodes around an operator of a graph, which runtimes"
    " turn into integer kernels.",
    "r1": "The rotation of the residual stream; folded into weights.",
    "r2": "The rotation of the values of each attention head; folded into weights.",
    "r3": "The rotation of queries and keys after RoPE, for a quantized cache; online.",
    "r4": "The rotation of what enters down_proj (a Hadamard matrix); online.",
    "recipe": "Everything that decides a run, as YAML: every output has one as rotq.yaml, which"
    " repeats it (--recipe).",
    "rotation": "An orthogonal matrix that spreads outliers over all channels and leaves what the"
    " model computes as it is.",
    "rung": "One step of the parity check. 0: the files are what was calibrated; 1: the rotated"
    " float model is the original; 2: the runtime computes what the artifact says; 3: quality.",
    "scheme": "Which number formats weights and activations get, and what shares a scale: int8,"
    " int4-weight-only, ... (--scheme).",
    "smoothquant": "Scales that move outliers from activations into weights, folded"
    " (--smoothing smoothquant:auto).",
    "target": "The runtime that files are for (--target); it decides the dtype, and what can be"
    " expressed.",
    "top-1 agreement": "The share of tokens for which original and export find the same next token"
    " most likely.",
    "wider": "Of a linear's input: a scale for each token, or float, in place of one static scale"
    " (--overrides auto).",
}
"""By term, in small letters."""
