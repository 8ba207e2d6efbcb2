//! Every system call and every call of the dynamic loader, with the types of the rest of the crate.

mod loader;
mod memory;
mod process;

pub(crate) use loader::{Library, TlsModule, libraries, loaded_count, lookup, lookup_next, touch_module};
pub(crate) use memory::{
    DontNeed, discard, map_again, map_reserved, page_size, physical_memory, pkey_alloc, protect, unmap, use_small_pages,
};
pub(crate) use process::{
    AlternateStack, SignalAction, alternate_stack, auxiliary, default_action, exit_now, fork_probe, in_forked_children,
    minimum_signal_stack, process_id, replace_action, resend, rseq_area, set_alternate_stack, unblock, unregister_rseq,
};
