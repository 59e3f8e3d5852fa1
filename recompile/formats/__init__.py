"""The table of formats: what stored parts make up one module. Imports no torch.

A format is one row here and one file beside this one, `recompile/formats/<code>.py`, which offers

    dequantize(parts, scheme) -> Tensor     dense [out_features, in_features]

A row tells from tensor headers alone which format a module is in and what its shape is, so that planning, recipes and
`--dry-run` never read a tensor. Stored size needs no row: it is the bytes of all parts of the module, bias included.
"""
