"""Operations on tensors: attention, token convolution, normalisation, MLPs."""

if __name__ == "kernels":
    # The working directory is the repository root, where Python takes this folder for the package
    # `kernels` of Hugging Face, which transformers looks for. A version below any that it accepts
    # says "not here"; loading the operations a second time would register them twice.
    __version__ = "0"
else:
    from .ada_layer_norm import ada_layer_norm, gated_ada_layer_norm, gated_add
    from .grouped_mlp import grouped_mlp
    from .layer_norm import layer_norm
    from .linear_attention import linear_attention
    from .linear_attention_conv import FilterMlp, linear_attention_conv2d
    from .local_attention import local_attention
    from .rotary_rms_norm import rotary_rms_norm
    from .stacked_linear import TensorTable, stacked_linear
    from .token_conv import token_conv2d

    __all__ = [
        "FilterMlp",
        "TensorTable",
        "ada_layer_norm",
        "gated_ada_layer_norm",
        "gated_add",
        "grouped_mlp",
        "layer_norm",
        "linear_attention",
        "linear_attention_conv2d",
        "local_attention",
        "rotary_rms_norm",
        "stacked_linear",
        "token_conv2d",
    ]
