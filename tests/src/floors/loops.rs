//! Finds loops in a graph.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// A strongly connected component: nodes that can all reach each other.
pub(super) struct Knot {
    pub(super) modules: Vec<usize>,
    /// A shortest loop through each node, without duplicates, shortest first.
    pub(super) loops: Vec<Vec<usize>>,
}

/// Finds the strongly connected components that have a loop. `arrows` are the edges of the graph.
pub(super) fn find(arrows: &BTreeSet<(usize, usize)>) -> Vec<Knot> {
    let nodes: BTreeSet<_> = arrows.iter().map(|&(from, _)| from).collect();
    let reached: BTreeMap<_, _> = nodes.iter().map(|&node| (node, search(arrows, node))).collect();
    let mut knots = Vec::new();
    let mut known: BTreeSet<usize> = BTreeSet::new();
    for &node in nodes.iter().filter(|&&node| reached[&node].contains_key(&node)) {
        if known.contains(&node) {
            continue;
        }
        let tied = |other: &&usize| reached.get(other).is_some_and(|back| back.contains_key(&node));
        let modules: Vec<_> = reached[&node].keys().filter(tied).copied().collect();
        known.extend(&modules);
        let mut loops: Vec<_> = modules.iter().map(|&module| shortest(&reached[&module], module)).collect();
        loops.sort_by_key(|chain| (chain.len(), chain.clone()));
        loops.dedup();
        knots.push(Knot { modules, loops });
    }
    knots
}

/// Returns the edges of a loop.
pub(super) fn pairs(chain: &[usize]) -> impl Iterator<Item = (usize, usize)> {
    chain.iter().copied().zip(chain.iter().copied().cycle().skip(1))
}

/// Searches breadth first. Returns the nodes reachable from `start`, each with its predecessor.
fn search(arrows: &BTreeSet<(usize, usize)>, start: usize) -> BTreeMap<usize, usize> {
    let mut before = BTreeMap::new();
    let mut queue = VecDeque::from([start]);
    while let Some(node) = queue.pop_front() {
        for &(_, next) in arrows.range((node, 0)..=(node, usize::MAX)) {
            before.entry(next).or_insert_with(|| {
                queue.push_back(next);
                node
            });
        }
    }
    before
}

/// Returns the loop through `start` that a search found. It begins with its lowest node, so that duplicates compare
/// equal.
fn shortest(before: &BTreeMap<usize, usize>, start: usize) -> Vec<usize> {
    let mut chain = vec![start];
    let mut node = before[&start];
    while node != start {
        chain.push(node);
        node = before[&node];
    }
    chain.reverse();
    let lowest = (0..chain.len()).min_by_key(|&place| chain[place]).unwrap_or(0);
    chain.rotate_left(lowest);
    chain
}
