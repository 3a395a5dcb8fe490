//! A byte trie over pieces.

use std::collections::VecDeque;
use std::ops::Range;

/// A map from keys to ids. Nodes are stored breadth first, siblings contiguously in byte order.
#[derive(Debug)]
pub(super) struct Trie {
    nodes: Vec<TrieNode>,
    /// The byte on the edge to each node, stored apart from the nodes so that a search among children touches few cache
    /// lines.
    bytes: Vec<u8>,
    /// For nodes with many children: child number by byte, counted from 1, or 0 for none.
    tables: Vec<[u16; 256]>,
}

#[derive(Debug, Clone)]
struct TrieNode {
    /// [`NO_ID`] if no key ends here.
    id: u32,
    children_start: u32,
    /// At most 256.
    children_len: u16,
    /// Index into [`Trie::tables`], or [`NO_TABLE`].
    table: u16,
}

/// Up to this many children are searched linearly; most nodes have one or none.
const FEW_CHILDREN: usize = 6;
/// Limit on tables, 2 MB in all; nodes past it use binary search.
const MAX_TABLES: usize = 1 << 12;
const NO_TABLE: u16 = u16::MAX;
const NO_ID: u32 = u32::MAX;

impl Trie {
    /// Builds a trie. Empty keys are ignored, and of equal keys one is kept. Keys must have at most 2^32 - 2 bytes in
    /// total, which the limit on file size guarantees, and no id may be 2^32 - 1.
    pub(super) fn new<'a>(keys: impl Iterator<Item = (&'a [u8], u32)>) -> Trie {
        let mut keys: Vec<(&[u8], u32)> = keys.filter(|(key, _)| !key.is_empty()).collect();
        keys.sort_unstable();
        keys.dedup_by_key(|(key, _)| *key);
        let empty = TrieNode { id: NO_ID, children_start: 0, children_len: 0, table: NO_TABLE };
        let mut trie = Trie { bytes: vec![0], nodes: vec![empty.clone()], tables: Vec::new() };
        // Nodes whose children remain to be created: the node, the range of keys that pass through it, and its depth.
        let mut open: VecDeque<(usize, Range<usize>, usize)> = VecDeque::from([(0, 0..keys.len(), 0)]);
        while let Some((node, through, depth)) = open.pop_front() {
            let start = trie.nodes.len();
            let mut from = through.start;
            while from < through.end {
                // A key that ends here sorts first and belongs to this node, not to a child.
                let Some(byte) = keys[from].0.get(depth).copied() else {
                    trie.nodes[node].id = keys[from].1;
                    from += 1;
                    continue;
                };
                let same = keys[from..through.end].partition_point(|(key, _)| key.get(depth) == Some(&byte));
                open.push_back((trie.nodes.len(), from..from + same, depth + 1));
                trie.bytes.push(byte);
                trie.nodes.push(empty.clone());
                from += same;
            }
            let children = &trie.bytes[start..];
            trie.nodes[node].children_start = start as u32;
            trie.nodes[node].children_len = children.len() as u16;
            // The root always gets a table, because every byte of a text is looked up there.
            if (node == 0 || children.len() > FEW_CHILDREN) && trie.tables.len() < MAX_TABLES {
                let mut table = [0; 256];
                for (index, byte) in children.iter().enumerate() {
                    table[usize::from(*byte)] = index as u16 + 1;
                }
                trie.nodes[node].table = trie.tables.len() as u16;
                trie.tables.push(table);
            }
        }
        trie
    }

    /// Calls `found` with the length and id of every key that is a prefix of `text`, shortest first.
    #[inline(always)]
    pub(super) fn prefixes(&self, text: &[u8], mut found: impl FnMut(usize, u32)) {
        let mut node = &self.nodes[0];
        for (index, byte) in text.iter().enumerate() {
            let Some(child) = self.child(node, *byte) else { return };
            node = child;
            if node.id != NO_ID {
                found(index + 1, node.id);
            }
        }
    }

    /// Length of the longest key that is a prefix of `text`.
    #[inline]
    pub(super) fn longest(&self, text: &[u8]) -> Option<usize> {
        let mut longest = None;
        self.prefixes(text, |len, _| longest = Some(len));
        longest
    }

    /// Returns true if some key starts with this byte.
    pub(super) fn has_first(&self, byte: u8) -> bool {
        self.child(&self.nodes[0], byte).is_some()
    }

    #[inline(always)]
    fn child(&self, node: &TrieNode, byte: u8) -> Option<&TrieNode> {
        let start = node.children_start as usize;
        let index = if let Some(table) = self.tables.get(usize::from(node.table)) {
            usize::from(table[usize::from(byte)]).checked_sub(1)?
        } else {
            match &self.bytes[start..start + usize::from(node.children_len)] {
                [] => return None,
                [only] => (*only == byte).then_some(0)?,
                bytes if bytes.len() <= FEW_CHILDREN => bytes.iter().position(|child| *child == byte)?,
                bytes => bytes.binary_search(&byte).ok()?,
            }
        };
        self.nodes.get(start + index)
    }
}
