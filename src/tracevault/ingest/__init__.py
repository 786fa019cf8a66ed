"""From a NATS JetStream stream into PostgreSQL: the streams, and the workers that write what is in them."""
