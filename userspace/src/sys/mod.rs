//! Every system call and every call of the dynamic loader, with the types of the rest of the crate.

mod loader;
mod memory;
mod process;

pub(crate) use loader::{
    Library, TlsModule, function_at, libraries, loaded_count, lookup, lookup_next, next_symbol, prepare_unwinding,
    touch_module,
};
pub(crate) use memory::{
    DontNeed, discard, map_again, map_reserved, page_size, physical_memory, pkey_alloc, protect, unmap, use_small_pages,
};
pub(crate) use process::{
    Action, AlternateStack, SS_AUTODISARM, Timer, action, alternate_stack, around_forks, auxiliary, change_mask,
    create_timer, delete_timer, exit_now, fork_probe, process_id, resend, restore_alternate_stack, rseq_area,
    set_action, set_alternate_stack, set_for_thread, set_mask, set_timer, thread_key, unblock, unregister_rseq,
};
