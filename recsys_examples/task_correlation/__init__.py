"""The MMoE paper's synthetic study: two regression tasks of given correlation."""
