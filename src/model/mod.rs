//! Model definitions: a config becomes a graph.

mod nemotron;

pub use nemotron::build_graph;
