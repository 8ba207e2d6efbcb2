//! The record of what is mapped in a domain's memory, and with which protection.
//!
//! It lies outside the domain. What is in no run is reserved: it has no access, no memory and no key.

use std::ops::Range;

use crate::sys::Protection;

/// Pages with one protection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) pages: Range<usize>,
    pub(crate) protection: Protection,
    /// The pages are no private anonymous memory.
    pub(crate) is_file: bool,
}

impl Run {
    /// Returns private anonymous memory that can be read and written.
    pub(crate) const fn new(pages: Range<usize>) -> Self {
        Self { pages, protection: Protection::READ_WRITE, is_file: false }
    }
}

/// The runs of one domain, in the order of their addresses. Two that touch differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Layout {
    runs: Vec<Run>,
}

impl Layout {
    /// The most runs. A key that moves costs a system call for each.
    pub(crate) const MOST: usize = 1024;

    /// Returns the layout of a new domain with these parts.
    pub(crate) fn new(parts: impl IntoIterator<Item = Range<usize>>) -> Self {
        let mut runs: Vec<_> = parts.into_iter().map(Run::new).collect();
        runs.sort_by_key(|run| run.pages.start);
        Self { runs }
    }

    /// Returns the runs.
    pub(crate) fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// Returns the layout with a range replaced: by a run, or by reserved addresses. `None` if it has too many runs.
    pub(crate) fn replaced(&self, pages: &Range<usize>, by: Option<Run>) -> Option<Self> {
        let before = self.clipped(0..pages.start);
        let after = self.clipped(pages.end..usize::MAX);
        Self::joined(before.chain(by).chain(after))
    }

    /// Returns the layout with a range's protection changed. `None` if it has too many runs.
    pub(crate) fn protected(&self, pages: &Range<usize>, protection: Protection) -> Option<Self> {
        let before = self.clipped(0..pages.start);
        let after = self.clipped(pages.end..usize::MAX);
        Self::joined(before.chain(self.clipped(pages.clone()).map(|run| Run { protection, ..run })).chain(after))
    }

    /// Joins runs that touch and do not differ.
    fn joined(runs: impl Iterator<Item = Run>) -> Option<Self> {
        let mut joined: Vec<Run> = Vec::new();
        for run in runs {
            match joined.last_mut() {
                Some(last)
                    if last.pages.end == run.pages.start
                        && (last.protection, last.is_file) == (run.protection, run.is_file) =>
                {
                    last.pages.end = run.pages.end;
                }
                _ => joined.push(run),
            }
        }
        (joined.len() <= Self::MOST).then_some(Self { runs: joined })
    }

    /// Returns the runs within a range, cut off at its ends.
    pub(crate) fn clipped(&self, pages: Range<usize>) -> impl Iterator<Item = Run> + use<'_> {
        self.runs.iter().filter_map(move |run| {
            let part = run.pages.start.max(pages.start)..run.pages.end.min(pages.end);
            (!part.is_empty()).then(|| Run { pages: part, ..run.clone() })
        })
    }

    /// Returns whether a range is mapped, and allows an access everywhere.
    pub(crate) fn allows(&self, range: &Range<usize>, protection: Protection) -> bool {
        let mut end = range.start;
        for run in self.clipped(range.clone()).filter(|run| run.protection.allows(protection)) {
            if run.pages.start != end {
                return false;
            }
            end = run.pages.end;
        }
        end >= range.end
    }

    /// Returns whether a range is mapped.
    pub(crate) fn is_mapped(&self, range: &Range<usize>) -> bool {
        self.allows(range, Protection::NONE)
    }

    /// Returns whether nothing is mapped in a range.
    pub(crate) fn is_free(&self, range: &Range<usize>) -> bool {
        self.clipped(range.clone()).next().is_none()
    }

    /// Returns the lowest free range of a size within a part.
    pub(crate) fn free(&self, part: &Range<usize>, size: usize) -> Option<Range<usize>> {
        let mut start = part.start;
        for run in self.clipped(part.clone()) {
            if run.pages.start - start >= size {
                break;
            }
            start = run.pages.end;
        }
        (part.end - start >= size).then(|| start..start + size)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PART: Range<usize> = 10..74;

    /// What each address is, one by one.
    fn by_address(layout: &Layout) -> Vec<Option<(Protection, bool)>> {
        let mut all = vec![None; PART.end];
        for run in layout.runs() {
            all[run.pages.clone()].fill(Some((run.protection, run.is_file)));
        }
        all
    }

    fn protection() -> impl Strategy<Value = Protection> {
        (0..8u64).prop_map(|bits| Protection::from_bits(bits).expect("any of three bits"))
    }

    fn range() -> impl Strategy<Value = Range<usize>> {
        (PART, 1..12usize).prop_map(|(start, size)| start..(start + size).min(PART.end))
    }

    proptest! {
        #[test]
        fn a_layout_is_what_its_changes_make_of_each_address(
            changes in proptest::collection::vec((range(), protection(), any::<bool>(), 0..3u8), 0..40),
            question in range(),
        ) {
            let mut layout = Layout::new([10..20, 30..74]);
            let mut expected = by_address(&layout);
            for (pages, protection, is_file, change) in changes {
                let run = Run { pages: pages.clone(), protection, is_file };
                let changed = match change {
                    0 => layout.replaced(&pages, None),
                    1 => layout.replaced(&pages, Some(run)),
                    _ => layout.protected(&pages, protection),
                };
                layout = changed.expect("there are few runs");
                expected[pages].iter_mut().for_each(|address| match change {
                    0 => *address = None,
                    1 => *address = Some((protection, is_file)),
                    _ => *address = address.map(|(_, is_file)| (protection, is_file)),
                });
                prop_assert_eq!(&by_address(&layout), &expected);
                let runs = layout.runs();
                prop_assert!(runs.windows(2).all(|two| two[0].pages.end <= two[1].pages.start));
            }
            let asked = &expected[question.clone()];
            prop_assert_eq!(layout.is_mapped(&question), asked.iter().all(Option::is_some));
            prop_assert_eq!(layout.is_free(&question), asked.iter().all(Option::is_none));
            let can_read = |it: &Option<(Protection, bool)>| it.is_some_and(|(it, _)| it.allows(Protection::READ));
            prop_assert_eq!(layout.allows(&question, Protection::READ), asked.iter().all(can_read));
            match layout.free(&PART, question.len()) {
                Some(found) => prop_assert!(layout.is_free(&found) && found.len() == question.len()),
                None => prop_assert!(expected[PART].windows(question.len()).all(|it| it.iter().any(Option::is_some))),
            }
        }
    }

    #[test]
    fn there_are_only_so_many_runs() {
        let whole = 0..usize::MAX / 2;
        let mut layout = Layout::new([whole]);
        let count = (1..).take_while(|n| {
            let changed = layout.protected(&(n * 2..n * 2 + 1), Protection::READ);
            changed.map(|changed| layout = changed).is_some()
        });
        assert_eq!(count.count(), (Layout::MOST - 1) / 2);
    }
}
