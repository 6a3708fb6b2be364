"""Rounding the weights of linears: to nearest, with searched limits, by GPTQ, by AdaRound."""
