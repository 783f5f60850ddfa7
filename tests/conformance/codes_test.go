package conformance

import (
	"context"
	"strings"
	"testing"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"
)

// family starts a daemon that holds one snapshot of each kind:
// base (committed) <- top (committed); active and view on top; bare without parent.
func family(t testing.TB) *server {
	t.Helper()
	s := serve(t)
	s.layer(t, "base", "", nil)
	s.layer(t, "top", "base", nil)
	_, err := s.prepare("active", "top", nil)
	must(t, err)
	_, err = s.view("view", "top", nil)
	must(t, err)
	_, err = s.prepare("bare", "", nil)
	must(t, err)
	return s
}

var familyNames = []string{"active", "bare", "base", "top", "view"}

// TestCodes asks for every refusal and looks that nothing changed by it. Where
// two checks fail at once, the one that the built-in snapshotters make first counts.
func TestCodes(t *testing.T) {
	needRoot(t)
	t.Parallel()
	s := family(t)

	t.Run("Create", func(t *testing.T) {
		for _, c := range []struct {
			what, key, parent string
			want              codes.Code
		}{
			{"missing parent", "new", "missing", codes.NotFound},
			{"active parent", "new", "active", codes.InvalidArgument},
			{"view parent", "new", "view", codes.InvalidArgument},
			{"key of an active", "active", "top", codes.AlreadyExists},
			{"key of a view", "view", "", codes.AlreadyExists},
			{"key of a committed", "top", "base", codes.AlreadyExists},
			{"own parent", "base", "base", codes.AlreadyExists},
			{"known key, missing parent", "active", "missing", codes.NotFound},
			{"known key, active parent", "view", "active", codes.InvalidArgument},
			{"itself as parent", "active", "active", codes.InvalidArgument},
			{"itself as parent, unknown", "new", "new", codes.NotFound},
			{"no key", "", "", codes.InvalidArgument},
		} {
			_, err := s.prepare(c.key, c.parent, nil)
			wantCode(t, "Prepare, "+c.what, err, c.want)
			_, err = s.view(c.key, c.parent, nil)
			wantCode(t, "View, "+c.what, err, c.want)
		}
	})

	t.Run("Commit", func(t *testing.T) {
		for _, c := range []struct {
			what, name, key, parent string
			want                    codes.Code
		}{
			{"name of a committed", "base", "active", "", codes.AlreadyExists},
			{"name of a view", "view", "active", "", codes.AlreadyExists},
			{"name is the key", "active", "active", "", codes.AlreadyExists},
			{"missing key", "new", "missing", "", codes.NotFound},
			{"key of a view", "new", "view", "", codes.FailedPrecondition},
			{"key of a committed", "new", "top", "", codes.FailedPrecondition},
			{"another parent", "new", "active", "base", codes.InvalidArgument},
			{"another, missing parent", "new", "active", "missing", codes.InvalidArgument},
			{"rebase on missing", "new", "bare", "missing", codes.NotFound},
			{"rebase on active", "new", "bare", "active", codes.FailedPrecondition},
			{"rebase on view", "new", "bare", "view", codes.FailedPrecondition},
			{"known name, missing key", "base", "missing", "", codes.AlreadyExists},
			{"known name, key of a view", "base", "view", "", codes.AlreadyExists},
			{"missing key, missing parent", "new", "missing", "missing", codes.NotFound},
			{"key of a view, another parent", "new", "view", "base", codes.FailedPrecondition},
			{"known name, another parent", "base", "active", "missing", codes.AlreadyExists},
			{"no name", "", "active", "", codes.InvalidArgument},
		} {
			wantCode(t, "Commit, "+c.what, s.commit(c.name, c.key, c.parent, nil), c.want)
		}
		// A snapshot that became its own parent would never be collected.
		for _, parent := range []string{"new", "bare"} {
			err := s.commit("new", "bare", parent, nil)
			if c := status.Code(err); c != codes.NotFound && c != codes.InvalidArgument && c != codes.FailedPrecondition {
				t.Errorf("Commit on itself (%s): %v", parent, err)
			}
		}
	})

	t.Run("Remove", func(t *testing.T) {
		wantCode(t, "Remove, missing", s.remove("missing"), codes.NotFound)
		for _, key := range []string{"base", "top"} {
			err := s.remove(key)
			wantCode(t, "Remove with children: "+key, err, codes.FailedPrecondition)
			if !strings.Contains(status.Convert(err).Message(), "remove") {
				t.Errorf("the message must contain the word remove: %v", err)
			}
		}
		// Each kind of child alone holds its parent.
		for _, kind := range []string{"active", "view", "committed"} {
			s.layer(t, "held", "", nil)
			var err error
			switch kind {
			case "active":
				_, err = s.prepare("holder", "held", nil)
			case "view":
				_, err = s.view("holder", "held", nil)
			case "committed":
				s.layer(t, "holder", "held", nil)
			}
			must(t, err)
			wantCode(t, "Remove with one child, "+kind, s.remove("held"), codes.FailedPrecondition)
			must(t, s.remove("holder"))
			must(t, s.remove("held"))
			wantCode(t, "Remove twice", s.remove("held"), codes.NotFound)
		}
	})

	t.Run("Read", func(t *testing.T) {
		_, err := s.mounts("missing")
		wantCode(t, "Mounts, missing", err, codes.NotFound)
		_, err = s.mounts("base")
		wantCode(t, "Mounts, committed", err, codes.FailedPrecondition)
		_, err = s.stat("missing")
		wantCode(t, "Stat, missing", err, codes.NotFound)
		_, err = s.stat("")
		if c := status.Code(err); c != codes.NotFound && c != codes.InvalidArgument {
			t.Errorf("Stat without a key: %v", err)
		}
		_, _, err = s.usage("missing")
		wantCode(t, "Usage, missing", err, codes.NotFound)
		_, err = s.list("kind==")
		wantCode(t, "List, bad filter", err, codes.InvalidArgument)
		wantCode(t, "Cleanup", s.cleanup(), codes.OK)
	})

	t.Run("Update", func(t *testing.T) {
		_, err := s.update(&snapshotsapi.Info{Name: "missing"})
		wantCode(t, "Update, missing", err, codes.NotFound)
		_, err = s.update(&snapshotsapi.Info{Name: "missing"}, "labels.a")
		wantCode(t, "Update of a label, missing", err, codes.NotFound)
		for _, path := range []string{"parent", "kind", "name", "created_at", "updated_at", "Labels", "label", "labelsx", "", "labels ", ".labels"} {
			_, err = s.update(&snapshotsapi.Info{Name: "base"}, path)
			wantCode(t, "Update, path "+path, err, codes.InvalidArgument)
		}
		ctx, cancel := limit()
		defer cancel()
		_, err = s.api().Update(ctx, &snapshotsapi.UpdateSnapshotRequest{Snapshotter: name})
		if c := status.Code(err); c != codes.InvalidArgument && c != codes.NotFound {
			t.Errorf("Update without info: %v", err)
		}
	})

	t.Run("Unknown", func(t *testing.T) {
		err := s.conn.Invoke(context.Background(), "/containerd.services.snapshots.v1.Snapshots/Nothing",
			&emptypb.Empty{}, &emptypb.Empty{})
		wantCode(t, "unknown call", err, codes.Unimplemented)
	})

	t.Run("Health", func(t *testing.T) {
		ctx, cancel := limit()
		defer cancel()
		r, err := grpc_health_v1.NewHealthClient(s.conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{})
		must(t, err)
		if r.GetStatus() != grpc_health_v1.HealthCheckResponse_SERVING {
			t.Errorf("health: %v", r.GetStatus())
		}
	})

	s.wantNames(t, familyNames...)
	for _, key := range familyNames {
		info, err := s.stat(key)
		must(t, err)
		if len(info.GetLabels()) != 0 {
			t.Errorf("%s got labels from a refused call: %v", key, info.GetLabels())
		}
	}
	s.wantConsistent(t)
}

// TestRebase commits parentless snapshots onto a parent that is named only then.
func TestRebase(t *testing.T) {
	needRoot(t)
	t.Parallel()
	s := serve(t)
	s.layer(t, "one", "", func(dir string) { write(t, dir+"/one", "1") })

	m, err := s.prepare("extract", "", nil)
	must(t, err)
	write(t, upper(t, m)+"/two", "2")
	must(t, s.commit("two", "extract", "one", map[string]string{"a": "b"}))
	info, err := s.stat("two")
	must(t, err)
	if info.GetParent() != "one" || info.GetLabels()["a"] != "b" {
		t.Errorf("after the rebase: %v", info)
	}
	wantCode(t, "Remove of the adopted parent", s.remove("one"), codes.FailedPrecondition)
	m, err = s.view("look", "two", nil)
	must(t, err)
	mounted(t, m, func(dir string) {
		wantFile(t, dir+"/one", "1")
		wantFile(t, dir+"/two", "2")
	})

	// The same parent again is no change; naming none keeps it.
	for key, parent := range map[string]string{"same": "one", "none": ""} {
		_, err = s.prepare("key "+key, "one", nil)
		must(t, err)
		must(t, s.commit(key, "key "+key, parent, nil))
		info, err = s.stat(key)
		must(t, err)
		if info.GetParent() != "one" {
			t.Errorf("%s: parent %q", key, info.GetParent())
		}
	}

	// Labels are those of the Commit; what the active had is gone with it.
	_, err = s.prepare("labelled", "one", map[string]string{"old": "1", "both": "1"})
	must(t, err)
	must(t, s.commit("relabelled", "labelled", "", map[string]string{"both": "2"}))
	info, err = s.stat("relabelled")
	must(t, err)
	if l := info.GetLabels(); len(l) != 1 || l["both"] != "2" {
		t.Errorf("labels after Commit: %v", l)
	}
	if !proto.Equal(info.GetCreatedAt(), info.GetUpdatedAt()) {
		t.Errorf("times after Commit differ: %v", info)
	}

	// A refused rebase leaves the active as it was, ready for the right one.
	m, err = s.prepare("retry", "", nil)
	must(t, err)
	wantCode(t, "rebase on a missing parent", s.commit("three", "retry", "missing", nil), codes.NotFound)
	again, err := s.mounts("retry")
	must(t, err)
	wantMounts(t, "after a refused Commit", again, m)
	must(t, s.commit("three", "retry", "two", nil))

	// A parent chain that came by rebase survives a crash.
	s.restart(t, killed)
	for key, parent := range map[string]string{"one": "", "two": "one", "three": "two"} {
		info, err = s.stat(key)
		must(t, err)
		if info.GetParent() != parent {
			t.Errorf("%s after a crash: parent %q", key, info.GetParent())
		}
	}
	s.wantConsistent(t)
}
