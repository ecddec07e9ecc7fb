//! Messages, chat templates, tokenizers and loss spans, exactly as transformers does them.
