//! Every system call and every call of the dynamic loader, with the types of the rest of the crate.

mod loader;
mod memory;
mod probe;
mod process;

pub(crate) use loader::{
    Library, TlsModule, function_at, libraries, loaded_count, lock_loader, lookup, lookup_next, next_symbol,
    prepare_unwinding, touch_module,
};
pub(crate) use memory::{
    DontNeed, discard, map_again, map_reserved, page_size, physical_memory, pkey_alloc, protect, unmap, use_small_pages,
};
pub(crate) use probe::{
    Outcome, RSEQ_GIVEN_UP, RSEQ_NONE, answer_yes, fork_probe, free_all_keys, fsgsbase, kernel_release, keys_in_all,
    keys_left, memfd_secret, mseal, pkru_in_signal_frame, rseq, syscall_user_dispatch,
};
pub(crate) use process::{
    Action, AlternateStack, BlockedSignals, SS_AUTODISARM, Timer, action, alternate_stack, around_forks, at_exit,
    auxiliary, change_mask, create_timer, delete_timer, exit_with, pause_timer, process_id, resend,
    restore_alternate_stack, rseq_area, send_value, set_action, set_alternate_stack, set_for_thread, set_mask,
    set_timer, start_a_thread, thread_exists, thread_handle, thread_id, thread_key, threads, unblock, unregister_rseq,
};
