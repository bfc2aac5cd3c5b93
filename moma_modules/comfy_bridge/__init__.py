"""Everything of the method that touches ComfyUI's internals: UNet layout, patches, the sampling run, folders."""
