def message(name):
    return {
        "HyperTile": "re-arranges the tokens of self-attention",
        "Token Merging (TomePatchModel)": "re-arranges the tokens of self-attention",
        "Other nodes that re-arrange attention": "another node changed the attention's input",
        "TorchCompileModel": "goes without TorchCompileModel",
        "Prompt from another text encoder": "no positive prompt of this run knows where the subject",
    }[name]
