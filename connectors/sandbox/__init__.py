"""A local exchange that speaks the Bybit v5 market endpoints: generated or replayed markets over HTTP."""
