"""What else rotq takes for granted of runtimes: facts that are in no rule of a target, but in how
graphs are written.

Torch-free. Together with the rules of all targets these are the lines of ``docs/runtime-facts.md``
(:mod:`exporter.tables.facts_table`).
"""

from __future__ import annotations

from backends.facts import (
    COMPRESSED_TENSORS,
    GENAI,
    MODELOPT,
    OPENVINO,
    ORT,
    TENSORRT_LLM,
    TENSORRT_RTX,
    TRANSFORMERS,
    TRIPY,
    VLLM,
    Fact,
    How,
    Runtime,
)

_ONNX, _SAFE = "backends/onnx", "backends/safetensors"


def _fact(
    runtime: Runtime | tuple[Runtime, ...], how: How, where: str, text: str, shown: str = ""
) -> Fact:
    return Fact(runtime if isinstance(runtime, tuple) else (runtime,), how, text, where, shown)


FACTS: tuple[Fact, ...] = (
    _fact(
        ORT,
        "asked",
        f"{_ONNX}/targets.py",
        "MatMulNBits takes int4 and int8 weights in blocks of 16 to 256 (1.31.1), of 16 and more "
        "(1.32.0), powers of "
        "two",
        f"{_ONNX}/test_asking.py::test_sizes_of_blocks_are_those_of_its_version",
    ),
    _fact(
        ORT,
        "asked",
        f"{_ONNX}/targets.py",
        "which kernel a linear of each scheme runs in, and whether its weight is dequantized on "
        "every run",
        f"{_ONNX}/test_schemes_ort.py::"
        "test_a_linear_runs_in_a_kernel_of_its_own_unless_there_is_a_warning",
    ),
    _fact(
        ORT,
        "asked",
        f"{_ONNX}/runner.py",
        "MatMulNBits of a default session is at accuracy level 4, and rounds inputs to int8 on "
        "this CPU",
        f"{_ONNX}/test_asking.py::test_rounding_of_inputs_is_seen_by_the_numbers",
    ),
    _fact(
        ORT,
        "asked",
        f"{_ONNX}/runner.py",
        "sums of products of uint8 and int8 are exact on this CPU, not clipped to 16 bits",
        f"{_ONNX}/test_asking.py::test_sums_are_exact_where_there_are_wide_ones",
    ),
    _fact(
        ORT,
        "tried",
        f"{_ONNX}/ort_options.py",
        "session.x64quantprecision makes weights that no kernel takes fail to run",
    ),
    _fact(
        ORT,
        "tested",
        f"{_ONNX}/inputs.py",
        "equal pairs of int8 quantizers are merged, and then make no integer kernels; of uint8 "
        "they do",
        f"{_ONNX}/test_schemes_ort.py::test_signed_pairs_that_are_merged_would_not_be_fused",
    ),
    _fact(
        ORT,
        "tested",
        f"{_ONNX}/lower.py",
        "a two-dimensional MatMul with a bias becomes a float Gemm before integer kernels are "
        "looked for",
        f"{_ONNX}/test_schemes_ort.py::test_a_value_of_two_dimensions",
    ),
    _fact(
        ORT,
        "tried",
        f"{_ONNX}/lower.py",
        "adding a scalar zero is dropped, adding a vector of zeros is not",
    ),
    _fact(
        ORT,
        "tested",
        f"{_ONNX}/cache.py",
        "a QuantizeLinear of keys moves up to their projection unless something is added between",
        f"{_ONNX}/test_cache.py::"
        "test_the_cache_is_stored_as_integers_and_every_projection_is_fused",
    ),
    _fact(
        ORT,
        "tested",
        f"{_ONNX}/targets.py",
        "there is nothing to run float4 in",
        f"{_ONNX}/test_schemes_ort.py::test_float4_has_nothing_to_run_in",
    ),
    _fact(
        ORT,
        "tried",
        f"{_ONNX}/runner.py",
        "graphs with float8 inputs load only with session.disable_quant_qdq",
    ),
    _fact(
        ORT,
        "tested",
        f"{_ONNX}/residual.py",
        "SkipSimplifiedLayerNormalization computes a residual sum and its norm; a CPU session "
        "does not fuse them",
        f"{_ONNX}/test_residual.py::test_sum_and_norm_are_what_they_were",
    ),
    _fact(
        ORT,
        "tested",
        f"{_ONNX}/shared_buffer.py",
        "GroupQueryAttention and TensorScatter write into a buffer that input and output share",
        f"{_ONNX}/test_kv_buffer_targets.py::test_onnx_runtime_writes_into_a_buffer_of_any_length",
    ),
    _fact(
        ORT,
        "tried",
        f"{_ONNX}/experts.py",
        "equal names of dimensions are taken for equal sizes",
    ),
    _fact(
        ORT,
        "tested",
        f"{_ONNX}/rotate.py",
        "a value of no rows is multiplied from the right, by a matrix, only",
        f"{_ONNX}/test_onnx_experts.py::test_an_expert_is_run_on_the_tokens_that_chose_it",
    ),
    _fact(
        ORT,
        "tried",
        f"{_ONNX}/packing.py",
        "weight-only linears gain by being one MatMul, integer ones where they are small",
    ),
    _fact(
        GENAI,
        "tested",
        f"{_ONNX}/genai.py",
        "types of models that it knows; others, and GPT-2, go as a plain decoder",
        f"{_ONNX}/test_genai.py::test_it_generates_what_the_runner_generates",
    ),
    _fact(
        OPENVINO,
        "asked",
        f"{_ONNX}/openvino_options.py",
        "precision, precision of the cache and groups of dynamic quantization that a compiled "
        "model chose on this CPU",
        "exporter/test_default_sessions.py::test_a_healthy_export_passes",
    ),
    _fact(
        OPENVINO,
        "asked",
        f"{_ONNX}/targets.py",
        "which kernel a linear of each scheme runs in: compressed weights in blocks of 4 and more",
        f"{_ONNX}/test_schemes_openvino.py::"
        "test_a_linear_runs_in_a_kernel_of_its_own_unless_there_is_a_warning",
    ),
    _fact(
        OPENVINO,
        "tested",
        f"{_ONNX}/targets.py",
        "blocks of a weight have to be whole",
        f"{_ONNX}/test_schemes_openvino.py::"
        "test_a_short_block_that_is_not_filled_up_is_refused_by_the_runtime",
    ),
    _fact(
        OPENVINO,
        "tested",
        f"{_ONNX}/fusion.py",
        "a constant that is computed while compiling loses its name",
        "exporter/test_default_sessions.py::"
        "test_linears_are_known_by_the_operator_that_they_end_in",
    ),
    _fact(
        OPENVINO,
        "tested",
        f"{_ONNX}/targets.py",
        "nothing writes into a shared buffer",
        f"{_ONNX}/test_kv_buffer_targets.py::test_openvino_has_nothing_that_writes_into_a_buffer",
    ),
    _fact(
        TENSORRT_RTX,
        "tested",
        f"{_ONNX}/tensorrt_rtx.py",
        "float8 builds for compute capability 8.9 and newer, float4 for 12.0",
        f"{_ONNX}/test_schemes_tensorrt.py::test_formats_are_built_from_the_gpus_on_that_have_them",
    ),
    _fact(
        TENSORRT_RTX,
        "tested",
        f"{_ONNX}/lower.py",
        "int8 inputs and blocked weights build only with something between quantizer and product",
        f"{_ONNX}/test_schemes_tensorrt.py::test_without_the_barrier_nothing_is_built",
    ),
    _fact(
        TENSORRT_RTX,
        "tried",
        f"{_ONNX}/experts.py",
        "there is no NonZero: experts run on all tokens",
    ),
    _fact(
        TENSORRT_RTX,
        "tried",
        f"{_ONNX}/embeddings.py",
        "an integer constant stands in front of a DequantizeLinear only",
    ),
    _fact(
        TENSORRT_RTX,
        "tested",
        f"{_ONNX}/targets.py",
        "a buffer that a graph writes into has a fixed length",
        f"{_ONNX}/test_kv_buffer_targets.py::"
        "test_tensorrt_writes_into_a_buffer_of_a_fixed_length_alone",
    ),
    _fact(TENSORRT_RTX, "tried", f"{_SAFE}/source.py", "blocks of 8 to 256 build"),
    _fact(
        TENSORRT_RTX,
        "tried",
        f"{_SAFE}/tensorrt/layout.py",
        "int8 inputs with a transposed int4 weight do not build",
    ),
    _fact(
        TRIPY,
        "tested",
        f"{_SAFE}/tripy/layout.py",
        "keys, shapes and dtypes of modules; blocks along axis 0 alone; weights are quantized "
        "while running",
        f"{_SAFE}/tripy/test_tripy_layout.py::test_keys_shapes_and_dtypes_are_those_of_the_modules",
    ),
    _fact(
        MODELOPT,
        "tested",
        f"{_SAFE}/modelopt/config.py",
        "keys, packing and configuration of the unified layout",
        f"{_SAFE}/modelopt/test_modelopt_export.py::test_is_what_modelopt_exports",
    ),
    _fact(
        (VLLM, TENSORRT_LLM),
        "read",
        f"{_SAFE}/modelopt/algorithms.py",
        "which of ModelOpt's formats each loads",
    ),
    _fact(
        VLLM,
        "read",
        f"{_SAFE}/compressed_tensors/transforms.py",
        "online rotations that it applies: those of linears without a bias and without tensor "
        "parallelism, none of queries and keys; by fast kernels where they are Sylvester's "
        "matrices in blocks of 16 to 128",
    ),
    _fact(
        (TRANSFORMERS, COMPRESSED_TENSORS),
        "tested",
        f"{_SAFE}/compressed_tensors/runner.py",
        "scales computed while running are amax over half the number of levels",
        f"{_SAFE}/compressed_tensors/test_compressed_transformers.py::"
        "test_scales_while_running_differ_by_the_divisor_alone",
    ),
    _fact(
        (TRANSFORMERS, COMPRESSED_TENSORS),
        "tested",
        f"{_SAFE}/compressed_tensors/runner.py",
        "scales of MXFP4 inputs may clip the largest value of a block",
        f"{_SAFE}/compressed_tensors/test_compressed_transformers.py::"
        "test_mxfp4_inputs_differ_by_the_rule_of_their_scales_alone",
    ),
    _fact(
        (TRANSFORMERS, COMPRESSED_TENSORS),
        "tested",
        f"{_SAFE}/compressed_tensors/limits.py",
        "transform_config is passed over",
        f"{_SAFE}/compressed_tensors/test_compressed_transforms.py::"
        "test_the_library_rotates_as_rotq_does",
    ),
    _fact(
        (TRANSFORMERS, COMPRESSED_TENSORS),
        "tried",
        f"{_SAFE}/compressed_tensors/models.py",
        "Conv1D, experts of other schemes than one of packed integers, and caches of attention "
        "without a projection of keys are not read",
    ),
    _fact(
        (TRANSFORMERS, COMPRESSED_TENSORS),
        "tested",
        f"{_SAFE}/compressed_tensors/config.py",
        "weights of NVFP4, MXFP4 and MXFP8 become bfloat16, and nothing else computes with them",
        f"{_SAFE}/compressed_tensors/test_compressed_transformers.py::"
        "test_the_default_session_is_plain_from_pretrained",
    ),
)
"""In the order of the runtimes."""
