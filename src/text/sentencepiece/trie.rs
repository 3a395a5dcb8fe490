//! A byte trie over pieces.

use std::collections::VecDeque;
use std::ops::Range;

/// Keys and the ids they stand for. Nodes lie breadth first, the children of one side by side in order of their bytes.
#[derive(Debug)]
pub(super) struct Trie {
    nodes: Vec<Node>,
    /// The child of the root by its byte, or 0, which is the root itself.
    first: Box<[u32; 256]>,
}

#[derive(Debug)]
struct Node {
    byte: u8,
    id: Option<u32>,
    /// In [`Trie::nodes`].
    children: Range<u32>,
}

impl Trie {
    /// A trie of keys that are not empty; of equal keys one is kept. At most 2^32 - 2 bytes in all, which a file of the
    /// size that is read cannot exceed.
    pub(super) fn new<'a>(keys: impl Iterator<Item = (&'a [u8], u32)>) -> Trie {
        let mut keys: Vec<(&[u8], u32)> = keys.filter(|(key, _)| !key.is_empty()).collect();
        keys.sort_unstable();
        keys.dedup_by_key(|(key, _)| *key);
        let mut trie = Trie { nodes: vec![Node { byte: 0, id: None, children: 0..0 }], first: Box::new([0; 256]) };
        // Nodes whose children are to be made: which keys pass through them, and how many bytes lead to them.
        let mut open = VecDeque::from([(0, 0..keys.len(), 0)]);
        while let Some((node, through, depth)) = open.pop_front() {
            let start = trie.nodes.len() as u32;
            let mut from = through.start;
            while from < through.end {
                // A key that ends here comes first and is not among the children's.
                let Some(byte) = keys[from].0.get(depth).copied() else {
                    trie.nodes[node].id = Some(keys[from].1);
                    from += 1;
                    continue;
                };
                let same = keys[from..through.end].partition_point(|(key, _)| key.get(depth) == Some(&byte));
                if node == 0 {
                    trie.first[usize::from(byte)] = trie.nodes.len() as u32;
                }
                open.push_back((trie.nodes.len(), from..from + same, depth + 1));
                trie.nodes.push(Node { byte, id: None, children: 0..0 });
                from += same;
            }
            trie.nodes[node].children = start..trie.nodes.len() as u32;
        }
        trie
    }

    /// All keys `text` starts with, short ones first: their length and id.
    pub(super) fn prefixes<'a>(&'a self, text: &'a [u8]) -> impl Iterator<Item = (usize, u32)> + 'a {
        let first = text.first().map_or(0, |byte| self.first[usize::from(*byte)]);
        let mut node = (first != 0).then(|| &self.nodes[first as usize]);
        let mut len = 0;
        std::iter::from_fn(move || {
            while let Some(here) = node {
                len += 1;
                node = text.get(len).and_then(|byte| self.child(here, *byte));
                if let Some(id) = here.id {
                    return Some((len, id));
                }
            }
            None
        })
    }

    /// The length of the longest key `text` starts with.
    pub(super) fn longest(&self, text: &[u8]) -> Option<usize> {
        self.prefixes(text).last().map(|(len, _)| len)
    }

    fn child(&self, node: &Node, byte: u8) -> Option<&Node> {
        let children = &self.nodes[node.children.start as usize..node.children.end as usize];
        let index = children.binary_search_by_key(&byte, |child| child.byte).ok()?;
        children.get(index)
    }
}
