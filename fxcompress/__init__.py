"""fxcompress: networks that compress themselves while they train."""
