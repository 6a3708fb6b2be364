"""SmoothQuant and AWQ: moving the size of input channels into the weights, folded into what is in
front of them.
"""
