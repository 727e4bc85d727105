"""Decoding on request: a Ray Serve application over the pipeline's engine.

    config      its settings                           app         HTTP: routes, limits, answers, errors
    gate        who may ask                            deployment  replicas on the cluster, start and stop
    parameters  what is asked, over HTTP or not        datasets    the datasets that it shows
    scheduler   bounded queue, batches of one shape    decoding    batches through the engine to coded video
    spool       files that are read while they grow    cache       coded videos on disk, within a limit

Only ``deployment`` imports Ray; the rest is tested without a cluster and without a model.
"""
