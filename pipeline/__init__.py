"""Video in, latents out: planning, decoding, engine, actors, dataset format, driver."""
