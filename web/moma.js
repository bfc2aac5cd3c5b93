// Notices of the pack's nodes, in every view of the editor: app mode shows no texts on nodes.
import { app } from '../../scripts/app.js'

app.registerExtension({
  name: 'MoMA.Notices',
  setup() {
    app.api.addEventListener('moma.notice', ({ detail }) => {
      app.extensionManager.toast.add({ severity: 'warn', summary: 'MoMA', detail: detail.text, life: 20000 })
    })
  }
})
